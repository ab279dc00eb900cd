"""A log that lost its end, filled up to where it was counted: no new event may get an offset that is taken.

What was counted stays counted: its rows are in the ledger. The offsets it had are filled with empty records,
which metering passes by. An event that was appended to one of them since would be passed by, too: its bytes
are appended again, behind the filling. Such an event was appended later than everything that was counted, by
the brokers' clocks. All of it blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from confluent_kafka import KafkaException, Message, Producer

from meterline.contracts.topics import USAGE_EVENTS
from meterline.errors import RetryLater
from meterline.metering.repair_evidence import Evidence, refused
from meterline.metering.state import Meta, meta_key
from meterline.settings import KafkaSettings
from meterline.streaming.committed import offset_of, read_committed
from meterline.streaming.log_ranges import offset_at
from meterline.streaming.owner import LogRange

__all__ = ["LogPlan", "fill_log", "plan_log"]

FILLING_KEY = b"meterline repair log"
FLUSH_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class LogPlan:
    """What the log lacks.

    Attributes:
        first: the first offset to fill, and
        last: the last one that was counted; before `first`: none is to be filled.
        counted_at: append time (ms) of the newest counted record.
        passed_by: events at counted offsets that were appended later than that.
    """

    log: LogRange
    first: int
    last: int
    counted_at: int
    passed_by: int


def plan_log(kafka: KafkaSettings, evidence: Evidence) -> LogPlan | None:
    """What is to be appended; None: nothing.

    Raises:
        PartitionHalted: there is no state of this topic that says how far it was counted.
    """
    log, saved = evidence.log, evidence.state.get(meta_key(evidence.log.partition))
    if saved is None:
        raise refused(log, "the changelog has no state that says how far it was counted: restore it first")
    meta = Meta.from_bytes(saved)
    if meta.topic_id != log.topic_id:
        raise refused(log, "the topic was re-created: its offsets are new ones, none of them is taken")
    plan = LogPlan(log, log.end_offset, meta.applied_offset, meta.appended_at, 0)
    passed_by = sum(1 for _ in _passed_by(kafka, plan))
    if plan.first > plan.last and not passed_by:
        return None
    return LogPlan(log, plan.first, plan.last, plan.counted_at, passed_by)


def fill_log(kafka: KafkaSettings, plan: LogPlan) -> int:
    """Fill the offsets; how many events that stand at a counted one were appended again.

    Interrupted, it is to be run again before a worker is: it appends again what it has appended, and the copy
    is a duplicate.

    Raises:
        RetryLater: Kafka does not take it all.
    """
    producer = Producer(kafka.client_config() | {"enable.idempotence": True, "acks": "all"})
    partition = plan.log.partition
    for _ in range(plan.first, plan.last + 1):
        _append(producer, partition, FILLING_KEY, b"")
    _flush(producer)
    again = 0
    for message in _passed_by(kafka, plan):  # also those that came while it was filled
        _append(producer, partition, message.key(), message.value())
        again += 1
    _flush(producer)
    return again


def _passed_by(kafka: KafkaSettings, plan: LogPlan) -> Iterator[Message]:
    partition = plan.log.partition
    start = offset_at(kafka, USAGE_EVENTS, partition, plan.counted_at + 1)
    if start is None:
        return
    for messages in read_committed(kafka, USAGE_EVENTS, partition, start):
        for message in messages:
            if offset_of(message) > plan.last:
                return
            if message.key() != FILLING_KEY and message.timestamp()[1] > plan.counted_at:
                yield message


def _append(producer: Producer, partition: int, key: bytes | None, value: bytes | None) -> None:
    while True:
        try:
            producer.produce(USAGE_EVENTS, value, key, partition)
        except BufferError:
            producer.poll(0.1)
        except KafkaException as error:
            raise RetryLater(f"Kafka does not take records of {USAGE_EVENTS}-{partition}: {error}") from None
        else:
            return


def _flush(producer: Producer) -> None:
    if left := producer.flush(FLUSH_S_MAX):
        raise RetryLater(f"{left} records were not acknowledged within {FLUSH_S_MAX:.0f} s; run this again")
