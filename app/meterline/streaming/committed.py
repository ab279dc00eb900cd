"""Read one partition from an offset to its present end: all that was committed, nothing that was aborted."""

from __future__ import annotations

from collections.abc import Iterator

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from meterline.errors import RetryLater
from meterline.settings import KafkaSettings

__all__ = ["offset_of", "read_committed"]

READ_TIMEOUT_S = 60.0
"""A poll that brings nothing for this long means the broker is away, not that the partition is long."""
MESSAGES_PER_POLL = 300
"""So many stay in a processor's cache until they are looked at: 10,000 at a time took 1.6 times as long."""


def read_committed(
    kafka: KafkaSettings, topic: str, partition: int, start_offset: int = 0
) -> Iterator[list[Message]]:
    """The records in the order of their offsets, some at a time. Blocks: call it in a thread.

    Args:
        start_offset: the first one to read; where the log begins later, it is read from there.

    Raises:
        RetryLater: the broker doesn't answer.
    """
    consumer = Consumer(
        kafka.client_config()
        | {
            "group.id": f"{topic}-reader",  # never commits; librdkafka wants a name
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 50,  # an empty partition is the common case and must not wait
            "queued.min.messages": 200_000,
            "fetch.queue.backoff.ms": 10,
        }
    )
    try:
        consumer.assign([TopicPartition(topic, partition, start_offset)])
        quiet_s = 0.0
        at_end = False
        while not at_end:
            records = []
            for message in consumer.consume(MESSAGES_PER_POLL, timeout=0.05):
                error = message.error()
                if error is None:
                    records.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    at_end = True
                    break
                elif error.fatal() or not error.retriable():
                    raise RetryLater(f"reading {topic}-{partition}: {error}")
            quiet_s = 0.0 if records else quiet_s + 0.05
            if quiet_s > READ_TIMEOUT_S:
                raise RetryLater(f"no answer from Kafka while reading {topic}-{partition}")
            if records:
                yield records
    finally:
        consumer.close()


def offset_of(message: Message) -> int:
    """Where a record that was read stands."""
    offset = message.offset()
    assert offset is not None  # the library's stubs allow for messages that were never sent
    return offset
