"""What a fast meter holds in memory, counted by Python's own allocator."""

from __future__ import annotations

import tracemalloc

import pytest
from tests import kafka_batches

pytest.importorskip("numba", reason="the extra `fast` is not installed")

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_from_record, event_to_record
from meterline.domain.events import UsageEvent
from meterline.domain.window_lengths import WindowLengths
from meterline.metering.fast import factory
from meterline.metering.state import Meta
from meterline.settings import MeteringSettings
from meterline.streaming.batches import BatchedRecords

CODEC = RecordCodec("usage-event")
FEW, BACKLOG = 100, 10_000
HORIZON, STEP = 2_400_000, 100_000
"""Each flush closes the slice of the one before."""
START = 10_000_000


class Flow:
    """A meter that is fed and flushed."""

    def __init__(self):
        options = MeteringSettings(window_length_ms=1_000, dedupe_horizon_ms=HORIZON)
        meta = Meta("cluster", "topic", -1, 0, 0, WindowLengths.of(1_000))
        self.now, self.offset = START, 0
        self.meter = factory.make_meter(0, options, self._decode, meta, lambda: CODEC.heads(1))

    @staticmethod
    def _decode(value):
        return event_from_record(CODEC.decode(value))

    def flush_of(self, count):
        """So many events of one client come in a chunk, and are committed."""
        self.now += STEP
        records = [(offset, self.now, b"c", self._event(offset), []) for offset in self._next(count)]
        batches = kafka_batches.batches_of(kafka_batches.batch(records[0][0], records, "none", self.now))
        self.meter.take(BatchedRecords(batches))
        flush = self.meter.build_flush(self.now)
        assert flush.accepted == count
        self.meter.committed(flush)

    def _next(self, count):
        first, self.offset = self.offset, self.offset + count
        return range(first, self.offset)

    def _event(self, offset):
        event = UsageEvent(
            event_id=f"event-{offset}",
            client_id="client",
            correlation_id=f"task-{offset}",
            sku="sku",
            credits_micro=1,
            occurred_at=self.now,
        )
        return CODEC.encode(event_to_record(event))


def test_a_backlog_is_not_remembered_in_bytes():
    """The room one large flush wanted is given up by the next: a moment's stall would stay for ever."""
    factory.warm_up()  # the compiler's memory is not the meter's
    tracemalloc.start()
    try:
        flow = Flow()
        for _ in range(4):
            flow.flush_of(FEW)
        usual, _ = tracemalloc.get_traced_memory()
        flow.flush_of(BACKLOG)
        much, _ = tracemalloc.get_traced_memory()
        for _ in range(4):
            flow.flush_of(FEW)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert much - usual > 4 * 2**20
    assert after - usual < 2**18
