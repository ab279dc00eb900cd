"""The state of a metering worker that has run for a day: its log, its ledger rows and its changelog.

Written directly, because a worker would need many minutes for it: the rows by ClickHouse itself, the
changelog with the product's own codecs, and records without a value for the offsets that are behind. All of
it follows from the number of an offset alone, so that every sum can be reckoned anew without reading any.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from confluent_kafka import KafkaError, Message, Producer
from tests.ledger_rows import columns_of, event

from meterline.contracts.topics import USAGE_EVENTS
from meterline.domain.events import UsageEvent, identity_hash, payload_digest
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SkuTotal
from meterline.ledger.client import connect
from meterline.ledger.writer import LedgerWriter
from meterline.metering.state import (
    Counters,
    Meta,
    aggregate_key,
    aggregate_value,
    meta_key,
    published_value,
    total_key,
    total_value,
    window_key,
)
from meterline.settings import Settings
from meterline.streaming.log_ranges import read_log_ranges

HOUR_MS = 3_600_000
HOURS = 24
"""Of usage, in windows of an hour."""
KEPT = 8
"""The newest of them are in the state, the older ones evicted."""
OPEN = 2
"""The newest of these have no snapshot yet."""
PARTITIONS = 4
CHANGELOG = "metering-state-changelog"
SKU = "gpu"
APPENDED_AFTER_MS = 1_000
SAMPLES = 500
"""Events of a partition with the identity of a real one: a copy of them can be sent."""
CHUNK = 100_000

SETTINGS = {
    "METERLINE_METERING__WINDOW_LENGTH_MS": str(HOUR_MS),
    "METERLINE_METERING__ALLOWED_LATENESS_MS": str(2 * HOUR_MS),
    "METERLINE_METERING__KEEP_CLOSED_WINDOWS_MS": str((KEPT + 1) * HOUR_MS),
    "METERLINE_METERING__DEDUPE_HORIZON_MS": str((HOURS + 2) * HOUR_MS),
}
"""Nothing closes, is evicted or leaves the horizon in the hour in which the bench runs."""

ROWS = """
INSERT INTO events (topic_id, partition, offset, appended_at, client_id, event_id, correlation_id, sku,
    credits_micro, billable, occurred_at, source, identity_hash, payload_digest)
WITH %(base)s + intDiv(number * %(span)s, %(ids)s) AS at
SELECT %(topic_id)s, %(partition)s, number, fromUnixTimestamp64Milli(toInt64(at + 1000), 'UTC'),
    concat(%(prefix)s, toString(number %% %(clients)s)), concat('old-', toString(number)), 'task', 'gpu',
    1000000 + number %% 7, true, fromUnixTimestamp64Milli(toInt64(at), 'UTC'), 'bench',
    bitShiftRight(reinterpretAsUInt128(sipHash128(%(partition)s, number)), 32), cityHash64(number)
FROM numbers(%(ids)s) WHERE number %% %(step)s != 0
"""


def credits_of(offset: int) -> int:
    """Micro-credits of the event at an offset."""
    return 1_000_000 + offset % 7


@dataclass(frozen=True, slots=True)
class OldState:
    """So much was there; sizes are of one partition.

    Attributes:
        ids: events, all within the horizon.
        clients: each has a window in every hour.
        base_ms: when the first event occurred; a full hour.
    """

    ids: int
    clients: int
    base_ms: int

    @property
    def sample_step(self) -> int:
        return max(1, self.ids // SAMPLES)

    def client(self, partition: int, number: int) -> str:
        return f"client-{partition}-{number}"

    def occurred_at(self, offset: int) -> int:
        return self.base_ms + offset * HOURS * HOUR_MS // self.ids

    def window_start(self, hour: int) -> int:
        return self.base_ms + hour * HOUR_MS

    def offsets(self, hour: int) -> range:
        """Those whose events occurred in an hour."""
        return range(-(-hour * self.ids // HOURS), -(-(hour + 1) * self.ids // HOURS))

    def sample(self, partition: int, offset: int) -> UsageEvent:
        """The event at an offset that is a multiple of the step."""
        client, occurred_at = self.client(partition, offset % self.clients), self.occurred_at(offset)
        return UsageEvent(f"sample-{offset}", client, "task", SKU, credits_of(offset), occurred_at, "bench")

    def window_sum(self, hour: int, client: int) -> SkuTotal:
        """What one client's hour adds up to, event by event."""
        offsets = self.offsets(hour)
        first = offsets.start + (client - offsets.start) % self.clients
        amounts = [credits_of(offset) for offset in range(first, offsets.stop, self.clients)]
        return SkuTotal(len(amounts), sum(amounts))

    def lifetime_sum(self, client: int) -> SkuTotal:
        """What one client has used in all hours, event by event."""
        amounts = [credits_of(offset) for offset in range(client, self.ids, self.clients)]
        return SkuTotal(len(amounts), sum(amounts))


def old_state(windows: int, ids: int) -> OldState:
    """A day that ended with the last full hour; sizes over all partitions."""
    base_ms = time.time_ns() // 1_000_000 // HOUR_MS * HOUR_MS - HOURS * HOUR_MS
    return OldState(ids // PARTITIONS, windows // PARTITIONS // KEPT, base_ms)


async def write(old: OldState, settings: Settings) -> None:
    """Log, ledger and changelog, as a worker would have left them."""
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "enable.idempotence": True,
            "linger.ms": 20,
            "batch.num.messages": CHUNK,
            "batch.size": 500_000,
            "queue.buffering.max.messages": 2 * CHUNK,
            "log_level": 0,
        }
    )
    ranges = read_log_ranges(settings.kafka, USAGE_EVENTS, list(range(PARTITIONS)))
    for partition, log in ranges.items():
        _send(producer, USAGE_EVENTS, partition, ((None, b"") for _ in range(old.ids)))
        await _write_rows(old, settings, log.topic_id, partition)
        meta = _meta(old, log.cluster_id, log.topic_id)
        _send(producer, CHANGELOG, partition, _changelog(old, partition, meta))


def _send(
    producer: Producer, topic: str, partition: int, records: Iterator[tuple[bytes | None, bytes]]
) -> None:
    refused: list[str] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            refused.append(error.str())

    for key, value in records:
        while True:
            try:
                producer.produce(topic, value, key, partition=partition, on_delivery=delivered)
                break
            except BufferError:
                producer.poll(0.05)
    if left := producer.flush(60):
        raise TimeoutError(f"the broker did not acknowledge {left} records")
    if refused:
        raise RuntimeError(f"{len(refused)} records were not written, the first: {refused[0]}")


async def _write_rows(old: OldState, settings: Settings, topic_id: str, partition: int) -> None:
    client = connect(settings.clickhouse)
    try:
        client.execute(
            ROWS,
            {
                "topic_id": topic_id, "partition": partition, "base": old.base_ms, "ids": old.ids,
                "span": HOURS * HOUR_MS, "prefix": old.client(partition, 0)[:-1], "clients": old.clients,
                "step": old.sample_step,
            },
        )  # fmt: skip
    finally:
        client.disconnect()
    rows = []
    for offset in range(0, old.ids, old.sample_step):
        sample = old.sample(partition, offset)
        fields = sample._asdict()
        del fields["corrects"]
        rows.append(
            event(
                offset,
                topic_id=topic_id,
                partition=partition,
                appended_at=sample.occurred_at + APPENDED_AFTER_MS,
                identity_hash=identity_hash(sample.client_id, sample.event_id),
                payload_digest=payload_digest(sample),
                **fields | {"attributes": {}},
            )
        )
    names, columns = columns_of(rows)
    writer = LedgerWriter(settings.clickhouse)
    await writer.insert("events", names, columns)
    await writer.close()


def _meta(old: OldState, cluster_id: str, topic_id: str) -> Meta:
    applied, newest = old.ids - 1, old.occurred_at(old.ids - 1)
    return Meta(
        cluster_id=cluster_id,
        topic_id=topic_id,
        applied_offset=applied,
        appended_at=newest + APPENDED_AFTER_MS,
        watermark=newest - OPEN * HOUR_MS,
        lengths=WindowLengths.of(HOUR_MS),
        counters=Counters(accepted=old.ids),
        published_until=applied,
        accounted_until=newest,
    )


def _changelog(old: OldState, partition: int, meta: Meta) -> Iterator[tuple[bytes, bytes]]:
    names = [old.client(partition, number) for number in range(old.clients)]
    for hour in range(HOURS - KEPT, HOURS):
        start, offsets = old.window_start(hour), old.offsets(hour)
        published = published_value(offsets.stop - 1, offsets.stop - 1)
        for name, total in zip(names, _sums(old, offsets), strict=True):
            yield aggregate_key(partition, start, name, SKU), aggregate_value(total)
            if hour < HOURS - OPEN:
                yield window_key(partition, start, name), published
    for name, total in zip(names, _sums(old, range(old.ids)), strict=True):
        yield total_key(partition, name), total_value(total, old.ids - 1)
    yield meta_key(partition), meta.to_bytes()


def _sums(old: OldState, offsets: range) -> Iterator[SkuTotal]:
    """Of every client, over some offsets; exact, as no sum comes near 2**53."""
    numbers = np.arange(offsets.start, offsets.stop)
    clients = numbers % old.clients
    counts = np.bincount(clients, minlength=old.clients)
    sums = np.bincount(clients, 1_000_000 + numbers % 7, minlength=old.clients)
    for count, total in zip(counts.tolist(), sums.tolist(), strict=True):
        yield SkuTotal(count, int(total))
