"""The meter against a naive one-pass model: same log, same money, whatever the chunks and crashes."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from typing import NamedTuple
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ledger_rows import dedupe_columns

from meterline.domain.events import Correction, CorrectionKind, UsageEvent, identity_hash, payload_digest
from meterline.domain.reasons import Reason
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SkuTotal
from meterline.errors import DeadLetterError
from meterline.ledger.tables import EVENT_COLUMNS
from meterline.metering import meter as meter_module
from meterline.metering.checks import lengths_asked_for
from meterline.metering.meter import Meter
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SliceFiles
from meterline.metering.state import Counters, Meta, meta_key
from meterline.settings import MeteringSettings
from meterline.streaming.owner import LogRange

LENGTH, HORIZON, START, FIRST = 1_000, 60_000, 10_000_000, 5
FIVE_MINUTES = 300_000
COLUMN = {name: number for number, name in enumerate(EVENT_COLUMNS)}
LOG = LogRange("cluster", "usage.events", "topic", 0, FIRST, 2**40)
CORRECTS = Correction("e0", CorrectionKind.AMEND, "topic", 0, 1)


class Record(NamedTuple):
    offset: int
    timestamp: int
    value: UsageEvent | None
    key: bytes | None = None


def decode(value):
    if value is None:
        raise DeadLetterError(Reason.UNDECODABLE, "no event")
    return value


# -- logs

drafts = st.tuples(
    st.sampled_from([0, 0, 0, 1, 2]),  # offsets without a record before this one
    st.sampled_from([0, 1, 100, 100, 1_000, 1_000, 5_000, 31_000, HORIZON, HORIZON + 1, -5_000, -40_000]),
    st.sampled_from([0, 0, -300, -1_000, -3_500, -20_000, -90_000, FIVE_MINUTES, FIVE_MINUTES + 1]),
    st.sampled_from("ab"),
    st.integers(0, 15),
    st.sampled_from("xy"),
    st.sampled_from([0, 1, 1, 1, 7, -3]),
    st.booleans(),
    st.sampled_from([None, None, CORRECTS]),
    st.sampled_from([False] * 9 + [True]),
)


@st.composite
def logs(draw):
    """Records of one partition; the broker's clock may step back, but by less than the horizon."""
    offset, clock, newest, log = FIRST - 1, START, START, []
    for gap, step, lag, client, number, sku, credits_micro, billable, corrects, broken in draw(
        st.lists(drafts, max_size=30)
    ):
        offset += 1 + gap
        clock = max(clock + step, newest - HORIZON + 1)
        newest = max(newest, clock)
        event = UsageEvent(
            f"e{number}",
            client,
            "task",
            sku,
            credits_micro,
            clock + lag,
            billable=billable,
            corrects=corrects,
        )
        log.append(Record(offset, clock, None if broken else event))
    return log


# -- the model: one pass, everything recomputed from the records accepted so far


class Limits(NamedTuple):
    skus: int = 4_000
    credits_micro: int = 2**63 - 1


LIMITS = Limits()
limits_of_sums = st.sampled_from([LIMITS] * 2 + [Limits(skus=1), Limits(credits_micro=4), Limits(1, 2)])


def enforced(limits):
    """The meter's own limits, so low that a few events reach them."""
    stack = ExitStack()
    stack.enter_context(patch.object(meter_module, "SKUS_PER_WINDOW_MAX", limits.skus))
    stack.enter_context(patch.object(meter_module, "INT64_MAX", limits.credits_micro))
    return stack


class Model:
    """`lengths`: from which event time on windows are how long, oldest first."""

    def __init__(self, log, limits=LIMITS, lengths=((0, LENGTH),)):
        self.limits, self.lengths = limits, lengths
        self.accepted, self.dead, self.duplicates = {}, {}, 0
        newest = 0
        for record in log:
            newest = max(newest, record.timestamp)
            fate = self._fate(record, newest)
            if fate is None:
                self.accepted[record.offset] = record
            elif fate == "duplicate":
                self.duplicates += 1
            else:
                self.dead[record.offset] = fate

    def _fate(self, record, newest):
        event = record.value
        if event is None:
            return Reason.UNDECODABLE
        if event.credits_micro < 0 and event.corrects is None:
            return Reason.NEGATIVE_CREDITS
        if event.occurred_at - record.timestamp > FIVE_MINUTES:
            return Reason.TIME_IN_FUTURE
        copies = [
            (old.timestamp, self._payload(old.value))
            for old in self.accepted.values()
            if (old.value.client_id, old.value.event_id) == (event.client_id, event.event_id)
        ]
        if not copies or newest - copies[-1][0] > HORIZON:
            return self._fate_by_sums(event)
        return "duplicate" if copies[-1][1] == self._payload(event) else Reason.CONFLICT

    def _fate_by_sums(self, event):
        """Window and lifetime with all that was ever accepted, wherever it is remembered."""
        window = self.windows(2**63).get((self.start_of(event), event.client_id), {})
        if event.sku not in window and len(window) >= self.limits.skus:
            return Reason.TOO_MANY_SKUS
        lifetime = self.totals(2**63).get(event.client_id, SkuTotal())
        for sums, reason in (
            (window.get(event.sku, SkuTotal()), Reason.WINDOW_TOTAL_OUT_OF_RANGE),
            (lifetime, Reason.LIFETIME_TOTAL_OUT_OF_RANGE),
        ):
            of = sums.credits_micro if event.billable else sums.free_credits_micro
            if abs(of + event.credits_micro) > self.limits.credits_micro:
                return reason
        return None

    @staticmethod
    def _payload(event):
        return (event.client_id, event.sku, event.credits_micro, event.billable, event.corrects)

    def totals(self, cutoff):
        """What each client has ever used."""
        totals = {}
        for (_, client), skus in self.windows(cutoff).items():
            for sku in skus.values():
                old = totals.get(client, SkuTotal())
                totals[client] = SkuTotal(
                    old.count + sku.count,
                    old.credits_micro + sku.credits_micro,
                    old.free_count + sku.free_count,
                    old.free_credits_micro + sku.free_credits_micro,
                )
        return totals

    def start_of(self, event):
        _, length = max(change for change in self.lengths if change[0] <= event.occurred_at)
        return event.occurred_at // length * length

    def windows(self, cutoff):
        totals = defaultdict(dict)
        for offset, record in self.accepted.items():
            if offset <= cutoff:
                event = record.value
                skus = totals[self.start_of(event), event.client_id]
                old = skus.get(event.sku, SkuTotal())
                paid, free = int(event.billable), int(not event.billable)
                skus[event.sku] = SkuTotal(
                    old.count + paid,
                    old.credits_micro + paid * event.credits_micro,
                    old.free_count + free,
                    old.free_credits_micro + free * event.credits_micro,
                )
        return dict(totals)


# -- a worker around the meter: what the ledger and the broker would hold


class Worker:
    def __init__(self, log, options):
        self.log, self.options = log, options
        self.ledger, self.dead, self.snapshots = {}, {}, []
        self.totals, self.progress = [], []
        self.duplicates, self.now = 0, START
        meta = Meta(
            "cluster", "topic", FIRST - 1, 0, 0, WindowLengths.of(LENGTH), Counters(first_offset=FIRST)
        )
        self.state = {meta_key(0): meta.to_bytes()}
        self.restart(options)

    def restart(self, options):
        meta = Meta.from_bytes(self.state[meta_key(0)])
        meta = replace(meta, lengths=lengths_asked_for(meta, LOG, options))
        seen = SlicedIndex(SliceFiles.of(options))
        rows = [
            row
            for offset, row in self.ledger.items()
            if offset <= meta.applied_offset and row[COLUMN["appended_at"]] >= meta.appended_at - HORIZON
        ]
        seen.add_all(*dedupe_columns(dict(zip(EVENT_COLUMNS, row, strict=True)) for row in rows))
        self.meter = Meter(0, options, decode, meta, seen)
        self.meter.restore(self.state)
        sums = self.sums(meta.applied_offset)
        kept = self.meter.kept_windows()
        assert kept == {key: sums.get(key) for key in kept}, "state and ledger differ"

    def sums(self, cutoff):
        """What the ledger's own rows say."""
        fake = Model([], lengths=self.lengths())
        for offset, row in self.ledger.items():
            names = ("event_id", "client_id", "correlation_id", "sku", "credits_micro", "occurred_at")
            event = UsageEvent(*(row[COLUMN[name]] for name in names), billable=row[COLUMN["billable"]])
            fake.accepted[offset] = Record(offset, 0, event)
        return fake.windows(cutoff)

    def lengths(self):
        return [(change.starts, change.length_ms) for change in self.meter.meta.lengths.changes]

    def take(self, count):
        todo = [record for record in self.log if record.offset >= self.meter.next_offset]
        self.meter.take(todo[:count])
        return len(todo) > count

    def build(self):
        applied = self.meter.meta.applied_offset
        for ref in self.meter.windows_lacking_past():
            self.meter.add_past(ref, self.sums(applied).get((ref.start, ref.client_id), {}))
        flush = self.meter.build_flush(self.now)
        if flush is not None:
            for row in zip(*flush.rows, strict=True):
                offset = row[COLUMN["offset"]]
                assert self.ledger.setdefault(offset, row) == row, "a row is a pure function of its record"
        return flush

    def commit(self, flush):
        if flush is None:
            return
        for key, value in flush.changelog:
            if value is None:
                self.state.pop(key, None)
            else:
                self.state[key] = value
        self.meter.committed(flush)
        assert Meta.from_bytes(self.state[meta_key(0)]) == flush.meta
        counters = flush.meta.counters
        assert flush.meta.applied_offset - FIRST + 1 == (
            counters.accepted + counters.duplicates + counters.dead_letters + counters.skipped
        )
        self.snapshots += flush.snapshots
        self.totals += flush.totals
        if flush.progress is not None:
            self.progress.append((flush.progress, len(self.totals)))
        self.duplicates += flush.duplicates
        for dead in flush.dead_letters:
            assert dead.record.offset not in self.dead
            self.dead[dead.record.offset] = dead.reason


options_of_a_worker = st.builds(
    MeteringSettings,
    window_length_ms=st.just(LENGTH),
    dedupe_horizon_ms=st.just(HORIZON),
    allowed_lateness_ms=st.sampled_from([0, 500]),
    grace_ms=st.sampled_from([0, 700, 5_000]),
    keep_closed_windows_ms=st.sampled_from([0, 2_000, 10**9]),
    late_snapshot_interval_ms=st.sampled_from([0, 3_000]),
)
steps = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.sampled_from(
            ["take", "flush", "flush", "feed in a flush", "idle", "caught up", "crash", "lost flush"]
        ),
        st.sampled_from([0, 1_000, 4_000]),
        options_of_a_worker,
    ),
    max_size=16,
)


def run(worker, plan):
    for count, step, pause, options in plan:
        worker.now += pause
        worker.take(count)
        if step == "flush":
            worker.commit(worker.build())
        elif step == "feed in a flush":
            flush = worker.build()
            worker.take(count)
            worker.commit(flush)
        elif step == "idle":
            worker.meter.advance_watermark(START + pause * 10)
            worker.commit(worker.build())
        elif step == "caught up":
            worker.take(len(worker.log))
            worker.meter.caught_up(START + pause)
            worker.commit(worker.build())
        elif step == "crash":
            worker.restart(options)
        elif step == "lost flush":
            worker.build()
            worker.restart(options)
    worker.take(len(worker.log))
    worker.commit(worker.build())
    worker.meter.advance_watermark(2**41)
    worker.now += 10_000
    worker.commit(worker.build())


def row_of(record):
    """The ledger's columns are the record's fields and its place in the log, nothing of the worker."""
    event = record.value
    return (
        *("topic", 0, record.offset, record.timestamp),
        *event[:10],
        *(event.corrects or ("", "", "", 0, 0)),
        identity_hash(event.client_id, event.event_id),
        payload_digest(event),
    )


@settings(max_examples=250, deadline=None)
@given(logs(), options_of_a_worker, steps, limits_of_sums)
def test_everything_that_is_said_is_a_function_of_the_log(log, options, plan, limits):
    """Invariants 1 to 4: ledger, dead letters, counters and windows are the model's, whatever happened.

    Limits of a window too: whether it is in memory or was evicted and comes back.
    """
    model = Model(log, limits)
    worker = Worker(log, options)
    with enforced(limits):
        run(worker, plan)

    assert {offset: row_of(record) for offset, record in model.accepted.items()} == worker.ledger
    assert model.dead == worker.dead
    assert model.duplicates == worker.duplicates
    latest = {}
    for snapshot in worker.snapshots:
        key = (snapshot.ref.start, snapshot.ref.client_id)
        assert model.windows(snapshot.cutoff_offset)[key] == snapshot.skus, "a snapshot is true for ever"
        assert key not in latest or latest[key][0] < snapshot.cutoff_offset, "said twice"
        latest[key] = (snapshot.cutoff_offset, snapshot.skus)
    assert model.windows(2**63) == {key: skus for key, (_, skus) in latest.items()}


FORGETFUL = MeteringSettings(
    window_length_ms=LENGTH,
    dedupe_horizon_ms=HORIZON,
    allowed_lateness_ms=0,
    keep_closed_windows_ms=0,
    late_snapshot_interval_ms=0,
)
"""Of a worker that forgets a window as soon as it is published."""

visits = st.tuples(
    st.integers(0, 3),  # which window
    st.sampled_from("xyz"),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from(["take", "take", "flush", "restart"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(visits, max_size=20), st.sampled_from([Limits(skus=1), Limits(skus=2), Limits(4_000, 4)]))
def test_limits_are_those_of_the_whole_window_whatever_memory_has_forgotten(visited, limits):
    """A few windows, visited again and again, in memory or not: the first event too many is a dead letter."""
    log = [
        Record(
            FIRST + number,
            START + number,
            UsageEvent(f"e{number}", "a", "task", sku, credits_micro, START - LENGTH * (5 - window)),
        )
        for number, (window, sku, credits_micro, _) in enumerate(visited)
    ]
    model = Model(log, limits)
    worker = Worker(log, FORGETFUL)
    with enforced(limits):
        for _, _, _, step in visited:
            worker.take(1)
            if step != "take":
                worker.commit(worker.build())
            if step == "restart":
                worker.restart(FORGETFUL)
        run(worker, [])

    assert {offset: row_of(record) for offset, record in model.accepted.items()} == worker.ledger
    assert model.dead == worker.dead
    newest = {(s.ref.start, s.ref.client_id): s.skus for s in worker.snapshots}
    assert model.windows(2**63) == newest


# -- windows that become longer or shorter

asked_for = st.sampled_from(
    [
        (LENGTH, 0),
        (2_000, START),
        (1_500, START + 200_000),
        (5_000, START + 2_000_000),
        (LENGTH, START + 2_500_000),
    ]
)
"""Length and since: what a worker's settings may say, each with any other in the group at the same time."""
long_drafts = st.tuples(
    st.sampled_from([0, 1, 700, 2_300, 150_000, 400_000, 1_000_000]),  # until the next one
    st.sampled_from([0, 0, -300, -1_000, -5_700, -400_000, -(10**6), FIVE_MINUTES]),
    st.sampled_from("ab"),
    st.sampled_from([1, 7, 30]),
)


def settings_asking_for(length_ms, since):
    return MeteringSettings(
        window_length_ms=length_ms,
        window_length_since=datetime.fromtimestamp(since / 1000, UTC),
        dedupe_horizon_ms=HORIZON,
        allowed_lateness_ms=0,
        keep_closed_windows_ms=2_000,
        late_snapshot_interval_ms=0,
    )


@settings(max_examples=250, deadline=None)
@given(
    st.lists(long_drafts, max_size=25),
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from(["flush", "restart", "lost flush"]), asked_for),
        max_size=12,
    ),
)
def test_windows_of_changing_length_hold_each_credit_once(drafted, plan):
    """Workers with older and newer settings take turns: each event is in the one window of its time, also if
    it is late, whatever was restarted; windows never overlap, and their sums are the events'.
    """
    log, clock = [], START
    for number, (step, lag, client, credits_micro) in enumerate(drafted):
        clock += step
        event = UsageEvent(f"e{number}", client, "task", "x", credits_micro, clock + lag)
        log.append(Record(FIRST + number, clock, event))
    worker = Worker(log, settings_asking_for(LENGTH, 0))
    for count, step, (length_ms, since) in plan:
        worker.now += 1_000
        worker.take(count)
        flush = worker.build()
        if step != "lost flush":
            worker.commit(flush)
        if step != "flush":
            worker.restart(settings_asking_for(length_ms, since))
    run(worker, [])

    model = Model(log, lengths=worker.lengths())
    newest = {}
    for snapshot in worker.snapshots:
        key = (snapshot.ref.start, snapshot.ref.client_id)
        assert model.windows(snapshot.cutoff_offset)[key] == snapshot.skus, "a snapshot is true for ever"
        newest[key] = snapshot
    assert model.windows(2**63) == {key: snapshot.skus for key, snapshot in newest.items()}
    assert sum(event.credits_micro for _, _, event, _ in log) == sum(
        snapshot.billable_credits_micro for snapshot in newest.values()
    )
    for client in "ab":
        spans = sorted((s.ref.start, s.ref.end) for s in newest.values() if s.ref.client_id == client)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "windows overlap"


@settings(max_examples=250, deadline=None)
@given(logs(), options_of_a_worker, steps)
def test_totals_and_progress_are_true_for_ever(log, options, plan):
    """A total is the model's at its cutoff; behind a progress no total up to its offset is missing, and no
    record appended at or before its time; both only grow. (A broker's clock that steps back is what the
    skew margin of the reservations is for.)
    """
    newest = accumulate((record.timestamp for record in log), max)
    log = [record._replace(timestamp=timestamp) for record, timestamp in zip(log, newest, strict=True)]
    model = Model(log)
    worker = Worker(log, options)
    run(worker, plan)

    for total in worker.totals:
        assert model.totals(total.cutoff_offset)[total.client_id] == total.sums
    before = (-1, -1)
    for progress, published in worker.progress:
        said = {total.client_id: total.sums for total in worker.totals[:published]}
        assert model.totals(progress.published_until) == said
        behind = [record.timestamp for record in log if record.offset > progress.published_until]
        assert all(timestamp > progress.accounted_until for timestamp in behind)
        after = (progress.published_until, progress.accounted_until)
        assert before[0] <= after[0]
        assert before[1] <= after[1]
        assert before != after
        before = after
    assert model.totals(2**63) == {total.client_id: total.sums for total in worker.totals}


@settings(max_examples=60, deadline=None)
@given(logs(), options_of_a_worker, st.data())
def test_a_moving_watermark_changes_no_total(log, options, data):
    """Wall time on an idle partition closes windows earlier and changes nothing they say."""
    worker = Worker(log, options)
    while worker.take(1):
        before = deepcopy(worker.meter.kept_windows())
        worker.meter.advance_watermark(START + data.draw(st.integers(-10_000, 10**7)))
        assert before == worker.meter.kept_windows()
    run(worker, [])

    assert Model(log).windows(2**63) == {
        (snapshot.ref.start, snapshot.ref.client_id): snapshot.skus for snapshot in worker.snapshots
    }
