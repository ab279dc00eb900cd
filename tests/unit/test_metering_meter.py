"""Moments of the meter that a random log seldom meets: cadence, eviction, restarts, idle partitions."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from meterline.domain.credits import CREDITS_MICRO_MAX
from meterline.domain.events import Correction, UsageEvent
from meterline.domain.reasons import Reason
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SKUS_PER_WINDOW_MAX, SkuTotal
from meterline.ledger.tables import EVENT_COLUMNS
from meterline.metering.meter import Meter
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SliceFiles
from meterline.metering.state import Counters, Meta, meta_key, parse_published_value, window_key
from meterline.settings import MeteringSettings

LENGTH, KEEP, CADENCE, HORIZON = 1_000, 10_000, 5_000, 60_000
T0 = 1_000_000


class Record(NamedTuple):
    offset: int
    timestamp: int
    value: UsageEvent
    key: bytes | None = None


class Partition:
    """A meter and its committed state."""

    def __init__(self):
        self.state, self.ledger_sums = {}, {}
        self.meter = None
        self.next = 0
        self.restart(Meta("cluster", "topic", -1, 0, 0, WindowLengths.of(LENGTH), Counters()))

    def restart(self, meta=None, keep=KEEP):
        meta = meta or Meta.from_bytes(self.state[meta_key(0)])
        options = MeteringSettings(
            window_length_ms=LENGTH,
            allowed_lateness_ms=0,
            dedupe_horizon_ms=HORIZON,
            keep_closed_windows_ms=keep,
            late_snapshot_interval_ms=CADENCE,
        )
        self.meter = Meter(0, options, lambda value: value, meta, SlicedIndex(SliceFiles.of(options)))
        self.meter.restore(self.state)
        self.next = meta.applied_offset + 1

    def take(self, occurred_at, event_id=None, timestamp=None, sku="gpu", credits_micro=1):
        event = UsageEvent(event_id or f"e{self.next}", "acme", "task", sku, credits_micro, occurred_at)
        self.meter.take([Record(self.next, timestamp or occurred_at, event)])
        self.next += 1

    def flush(self, now):
        flush = self.meter.build_flush(now)
        for key, value in flush.changelog if flush else ():
            if value is None:
                self.state.pop(key, None)
            else:
                self.state[key] = value
        if flush:
            self.meter.committed(flush)
        return flush

    def said(self, now):
        flush = self.flush(now)
        return [(s.ref.start, s.cutoff_offset, s.skus["gpu"].count) for s in flush.snapshots] if flush else []


@pytest.fixture
def partition():
    return Partition()


def test_a_row_has_the_events_fields_in_the_ledgers_order():
    """The meter copies them by position: a column moved on one side only would swap client and event."""
    assert UsageEvent._fields[:10] == EVENT_COLUMNS[4:14]
    assert tuple(f"corrects_{name}" for name in Correction._fields) == EVENT_COLUMNS[14:19]
    assert EVENT_COLUMNS[:4] == ("topic_id", "partition", "offset", "appended_at")
    assert EVENT_COLUMNS[19:] == ("identity_hash", "payload_digest")


def test_a_window_closes_when_the_watermark_reaches_its_end(partition):
    """Half-open: the event at the end of a window closes it and is in the next."""
    partition.take(T0)
    partition.take(T0 + LENGTH - 1)
    assert partition.said(0) == []

    partition.take(T0 + LENGTH)

    assert partition.said(CADENCE) == [(T0, 2, 2)]


def test_late_events_make_a_snapshot_at_a_bounded_cadence(partition):
    """Each late event at once would make a record of each; none is ever dropped."""
    now = 10 * CADENCE
    partition.take(T0)
    partition.take(T0 + LENGTH)
    assert partition.said(now) == [(T0, 1, 1)]
    partition.take(T0)

    assert partition.said(now + CADENCE - 1) == []
    assert partition.said(now + CADENCE) == [(T0, 2, 2)]
    assert partition.flush(now + 9 * CADENCE) is None


def test_a_window_that_comes_back_after_its_eviction_keeps_the_cadence(partition):
    """A backfill of old windows must not make a snapshot of each with every flush."""
    now = 10 * CADENCE
    partition.take(T0)
    partition.take(T0 + KEEP + LENGTH)
    partition.flush(now)
    partition.take(T0 + KEEP + LENGTH)
    partition.flush(now + CADENCE)
    assert (T0, "acme") not in partition.meter.windows

    partition.take(T0)
    (ref,) = partition.meter.windows_lacking_past()
    partition.meter.add_past(ref, {"gpu": SkuTotal(1, 1)})
    assert partition.said(now + CADENCE) == [(T0, 3, 2)]
    partition.take(T0)

    assert partition.said(now + CADENCE + 1) == []
    assert partition.said(now + 2 * CADENCE) == [(T0, 4, 3)]


def test_a_late_snapshot_that_is_due_survives_a_crash(partition):
    """Unpublished changes stand in the state: the restart publishes them, with no new record at all."""
    now = 10 * CADENCE
    partition.take(T0)
    partition.take(T0 + LENGTH)
    partition.flush(now)
    partition.take(T0)
    assert partition.said(now + 1) == []

    partition.restart()

    assert partition.said(now + 2) == [(T0, 2, 2)]
    partition.restart()
    assert partition.flush(now + 9 * CADENCE) is None, "said once"


def test_an_ended_window_asks_the_ledger_also_when_windows_are_kept_longer_now(partition):
    """It was evicted under the old setting: its bare rest published would take credits off the bill."""
    partition.restart(Meta("cluster", "topic", -1, 0, 0, WindowLengths.of(LENGTH), Counters()), keep=0)
    partition.take(T0)
    partition.take(T0 + LENGTH)
    partition.flush(10 * CADENCE)
    partition.take(T0 + LENGTH)
    partition.flush(20 * CADENCE)
    assert (T0, "acme") not in partition.meter.windows

    partition.restart(keep=10**9)
    partition.take(T0)

    assert [ref.start for ref in partition.meter.windows_lacking_past()] == [T0]


def test_a_window_that_came_back_is_whole_in_the_state(partition):
    """The past that was added is committed with it: a restart must not find the new events alone."""
    now = 10 * CADENCE
    partition.take(T0)
    partition.take(T0 + KEEP + LENGTH)
    partition.flush(now)
    partition.take(T0 + KEEP + LENGTH)
    partition.flush(now + CADENCE)
    partition.take(T0)
    (ref,) = partition.meter.windows_lacking_past()
    partition.meter.add_past(ref, {"gpu": SkuTotal(1, 1), "cpu": SkuTotal(1, 7)})
    partition.flush(now + CADENCE)

    partition.restart()

    kept = partition.meter.kept_windows()
    assert {"gpu": SkuTotal(2, 2), "cpu": SkuTotal(1, 7)} == kept[T0, "acme"]


@pytest.fixture
def evicted(partition):
    """The window at T0 is closed, published and no longer in memory."""
    partition.take(T0)
    partition.take(T0 + KEEP + LENGTH)
    partition.flush(10 * CADENCE)
    partition.take(T0 + KEEP + LENGTH)
    partition.flush(11 * CADENCE)
    assert (T0, "acme") not in partition.meter.windows
    return partition


FULL = {f"s{number}": SkuTotal(1, 1) for number in range(SKUS_PER_WINDOW_MAX)}
NEARLY_INT64 = {"gpu": SkuTotal(1, 2**63 - 2)}


@pytest.mark.parametrize(
    ("past", "sku", "credits_micro", "fate"),
    [
        (FULL, "one more", 1, Reason.TOO_MANY_SKUS),
        (FULL, "s1", 1, "ledger"),
        (NEARLY_INT64, "gpu", 2, Reason.WINDOW_TOTAL_OUT_OF_RANGE),
        (NEARLY_INT64, "gpu", 1, "ledger"),
        (NEARLY_INT64, "cpu", CREDITS_MICRO_MAX, "ledger"),
    ],
    ids=["4,001st SKU", "a SKU it has", "beyond int64", "up to int64", "another SKU"],
)
def test_a_window_that_comes_back_is_judged_with_its_past(evicted, past, sku, credits_micro, fate):
    """Accepted alone and added up later, the sum would be more than a record of the state can hold: the
    worker would die of it again after each restart.
    """
    evicted.take(T0, sku=sku, credits_micro=credits_micro)
    (ref,) = evicted.meter.windows_lacking_past()
    evicted.meter.add_past(ref, past)

    flush = evicted.flush(12 * CADENCE)

    assert fate == ([dead.reason for dead in flush.dead_letters] or ["ledger"])[0]
    assert flush.accepted == (fate == "ledger")
    if fate == "ledger":
        (snapshot,) = flush.snapshots
        assert snapshot.skus[sku].credits_micro == past.get(sku, SkuTotal()).credits_micro + credits_micro


def test_what_comes_behind_a_record_that_waits_waits_too(evicted):
    """The order of the log decides: a copy in front of its original would be the one that counts."""
    meter = evicted.meter
    evicted.take(T0, event_id="twice", credits_micro=3)
    evicted.take(T0 + KEEP + LENGTH, event_id="twice", credits_micro=4)
    assert (meter.pending, len(meter._rows), meter._dead) == (2, 0, [])

    meter.add_past(*meter.windows_lacking_past(), {"gpu": SkuTotal(1, 1)})

    assert [row[4 + UsageEvent._fields.index("credits_micro")] for row in meter._rows] == [3]
    assert [dead.reason for dead in meter._dead] == [Reason.CONFLICT]


def test_records_that_wait_are_not_accounted(evicted):
    """The log's clock may not pass them, or the holds of their work would expire before they are charged."""
    evicted.take(T0)
    evicted.meter.caught_up(T0 + 10**6)
    (ref,) = evicted.meter.windows_lacking_past()
    evicted.meter.add_past(ref, {})

    assert evicted.flush(12 * CADENCE).progress.accounted_until < T0 + 10**6


def test_a_refused_record_does_not_bring_its_window_back(evicted):
    """A window of the ledger in memory and not in the state would differ from it after a restart."""
    evicted.take(T0, sku="one more")
    (ref,) = evicted.meter.windows_lacking_past()
    evicted.meter.add_past(ref, FULL)

    assert (T0, "acme") not in evicted.meter.windows
    assert evicted.said(12 * CADENCE) == []


def test_a_snapshot_is_not_changed_by_what_comes_after_it(partition):
    """It may still wait for its transaction while the next events are folded in."""
    partition.take(T0)
    partition.take(T0 + LENGTH)
    flush = partition.flush(10 * CADENCE)
    partition.take(T0)

    assert flush.snapshots[0].skus == {"gpu": SkuTotal(1, 1)}


def test_wall_time_closes_a_window_when_nothing_is_pending(partition):
    """The flush says where the partition stands: same offset, same counters, the new watermark."""
    partition.take(T0)
    partition.flush(0)
    assert partition.meter.pending == 0

    partition.meter.advance_watermark(T0 + LENGTH)
    flush = partition.flush(CADENCE)

    assert [(s.ref.start, s.cutoff_offset) for s in flush.snapshots] == [(T0, 0)]
    assert (0, T0 + LENGTH, Counters(0, accepted=1)) == (
        flush.meta.applied_offset,
        flush.meta.watermark,
        flush.meta.counters,
    )
    assert flush.meta == Meta.from_bytes(partition.state[meta_key(0)])
    assert parse_published_value(partition.state[window_key(0, T0, "acme")]) == (0, 0)


def test_a_window_in_grace_is_not_evicted_before_it_is_published(partition):
    """Memory may keep windows for a shorter time than they stay open."""
    partition.meter._settings = partition.meter._settings.model_copy(
        update={"grace_ms": 3 * KEEP, "keep_closed_windows_ms": 0}
    )
    partition.take(T0)
    partition.take(T0 + KEEP)
    assert partition.said(10 * CADENCE) == []
    assert (T0, "acme") in partition.meter.windows

    partition.take(T0 + LENGTH + 3 * KEEP)

    assert partition.said(10 * CADENCE)[0] == (T0, 2, 1)


def test_a_broker_clock_that_steps_back_decides_the_same_after_a_restart(partition):
    """The horizon is counted from the newest append time, which is what a rebuilt index is cut at."""
    partition.take(T0, event_id="e", timestamp=T0)
    partition.take(T0, event_id="other", timestamp=T0 + HORIZON + 1)

    partition.take(T0, event_id="e", timestamp=T0 + HORIZON)

    assert (len(partition.meter._rows), partition.meter._duplicates) == (3, 0)
