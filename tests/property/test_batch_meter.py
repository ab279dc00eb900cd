"""The fast meter against the plain one: the same bytes, the same fates, money and state, whatever comes."""

from __future__ import annotations

import struct
from contextlib import ExitStack, suppress
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import kafka_batches
from tests.kafka_batches import CODECS

pytest.importorskip("numba", reason="the extra `fast` is not installed")

from tests.clickhouse_blocks import rows_of
from tests.ledger_rows import dedupe_columns

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_from_record, event_to_record
from meterline.domain.credits import CREDITS_MICRO_MAX
from meterline.domain.dedupe import SLICES_PER_HORIZON
from meterline.domain.events import Correction, CorrectionKind, UsageEvent
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SKUS_PER_WINDOW_MAX, SkuTotal
from meterline.ledger.tables import EVENT_COLUMNS
from meterline.metering import meter as meter_module
from meterline.metering import slices
from meterline.metering.fast import batch_meter, factory
from meterline.metering.meter import Meter
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SliceFiles
from meterline.metering.state import (
    Counters,
    Meta,
    aggregate_key,
    aggregate_value,
    meta_key,
    total_key,
    total_value,
)
from meterline.settings import MeteringSettings
from meterline.streaming.batches import BatchedRecords

LENGTH, HORIZON, START, FIRST = 1_000, 60_000, 10_000_000, 5
SLICE = HORIZON // SLICES_PER_HORIZON
FIVE_MINUTES = 300_000
REGISTRY_ID = 7
CODEC = RecordCodec("usage-event")
CODEC.register_id(REGISTRY_ID, 1)

# -- records: mostly events, and everything that is none

texts = st.sampled_from(["a", "b", "é", "\U0001f600x", "a" * 51, "é" * 100, "a" * 200, "a" * 201, "", "\x00"])
odd_ids = st.one_of(texts, st.text(max_size=4))
corrections = st.builds(
    Correction,
    event_id=st.sampled_from(["e0", "e1"]),
    kind=st.sampled_from(CorrectionKind),
    topic_id=st.just("topic"),
    partition=st.integers(0, 3),
    offset=st.integers(0, 9),
)
plain_events = st.builds(
    UsageEvent,
    event_id=st.sampled_from(["e0", "e1", "e2", "e3"]),
    client_id=st.sampled_from("aab"),
    correlation_id=st.sampled_from(["task", "task" * 20]),
    sku=st.sampled_from(["x", "y", "z" * 130]),
    credits_micro=st.sampled_from([0, 1, 1, 7, 9, 10, 63, 64, 999_999, CREDITS_MICRO_MAX]),
    occurred_at=st.sampled_from([0, 0, -300, -1_000, -3_500, -20_000, -90_000]),
    source=st.sampled_from(["", "src", "é" * 100]),
    attributes=st.sampled_from([{}, {}, {"k": "v"}, {"k": "", "": "w", "é": "v" * 200}]),
    reservation_id=st.sampled_from([None, None, "", "r1", "r" * 200]),
    billable=st.sampled_from([True, True, False]),
)
# One field at a time, so that a broken rule isn't hidden behind another one.
odd_values = {
    "event_id": odd_ids,
    "client_id": odd_ids,
    "correlation_id": odd_ids,
    "sku": odd_ids,
    "credits_micro": st.one_of(
        st.sampled_from([-1, -CREDITS_MICRO_MAX, CREDITS_MICRO_MAX + 1, 2**62, 2**63 - 1, -(2**63)]),
        st.integers(-(2**63), 2**63 - 1),
    ),
    "occurred_at": st.sampled_from(
        [FIVE_MINUTES, FIVE_MINUTES + 1, FIVE_MINUTES + 1, -START, -START - 1, -(2**62), 2**62]
    ),
    "source": texts,
    "attributes": st.one_of(
        st.dictionaries(texts, st.sampled_from(["", "v", "v" * 4_096, "v" * 4_097]), max_size=3),
        st.sampled_from([{str(number): "" for number in range(count)} for count in (64, 65)]),
    ),
    "reservation_id": texts,
    "corrects": corrections,
}


@st.composite
def odd_events(draw):
    field = draw(st.sampled_from(sorted(odd_values)))
    return draw(plain_events)._replace(**{field: draw(odd_values[field])})


heads = st.sampled_from(
    [b"\xc3\x01" + CODEC.newest.fingerprint] * 16
    + [struct.pack(">bI", 0, REGISTRY_ID)] * 2
    + [struct.pack(">bI", 0, 8), b"\xc3\x01" + bytes(8), b"\xc3", b"\x01"]
)


@st.composite
def mutations(draw):
    """Changes to encoded bytes, most of them none."""
    kind = draw(st.sampled_from(["none"] * 20 + ["flip", "cut", "more", "insert"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    what = draw(st.binary(min_size=1, max_size=3))

    def mutate(value):
        at = int(len(value) * where)
        return {
            "none": value,
            "flip": value[:at] + what + value[at + len(what) :],
            "cut": value[:at],
            "more": value + what,
            "insert": value[:at] + what + value[at:],
        }[kind]

    return mutate


def encoded(event, head, now):
    record = event_to_record(event._replace(occurred_at=now + event.occurred_at))
    with suppress(ValueError):
        return head + CODEC.encode(record)[10:]
    return b"no int64"


drafts = st.tuples(
    st.sampled_from([0, 0, 0, 0, 1, 3]),  # offsets without a record before this one
    st.sampled_from([0, 0, 0, 1, 100, 1_000, 5_000, HORIZON, HORIZON, HORIZON + 1, -5_000]),
    st.one_of(plain_events, plain_events, odd_events()),
    heads,
    mutations(),
    st.sampled_from([None, b"", b"key"]),
    st.sampled_from([[], [], [("h", b"v")], [("h", None), ("é", b"")]]),
    st.sampled_from(["event"] * 20 + ["no value", "random"]),
    st.binary(max_size=30),
    st.sampled_from([False, False, True]),  # a new batch begins
    st.sampled_from(list(CODECS)),
    st.booleans(),  # append time
)


@st.composite
def logs(draw):
    """A fetch: bytes of batches; their records' offsets."""
    offset, clock, data, offsets, batches = FIRST - 1, START, b"", [], []
    for gap, step, event, head, mutate, key, headers, kind, noise, new, codec, append_time in draw(
        st.lists(drafts, max_size=25)
    ):
        offset += 1 + gap
        clock = max(START, clock + step)
        value = {"event": mutate(encoded(event, head, clock)), "no value": None, "random": noise}[kind]
        if new or not batches:
            batches.append((codec, append_time, []))
        batches[-1][2].append((offset, clock, key, value, headers))
        offsets.append(offset)
    for codec, append_time, records in batches:
        base = records[0][0]
        data += kafka_batches.batch(base, records, codec, records[-1][1] if append_time else None)
    return data, offsets


# -- two workers


def decode(value):
    return event_from_record(CODEC.decode(value))


class Side:
    """A meter, and what the ledger and the broker would hold of it."""

    def __init__(self, fast, options, state):
        self.fast, self.state = fast, dict(state)
        self.ledger, self.forgotten = {}, {}
        self.restart(options)

    def restart(self, options):
        meta = Meta.from_bytes(self.state[meta_key(0)])
        if self.fast:
            self.meter = factory.make_meter(0, options, decode, meta, lambda: CODEC.heads(1))
        else:
            self.meter = Meter(0, options, decode, meta, SlicedIndex(SliceFiles.of(options)))
        rows = [row for offset, row in self.ledger.items() if offset <= meta.applied_offset]
        self.meter.seen.add_all(*dedupe_columns(rows))
        self.meter.restore(self.state)

    def take(self, data, until, *, in_batches=True):
        """Feed what comes up to an offset, as the engine would."""
        first = self.meter.next_offset
        if self.fast and in_batches:
            batches = [
                b for b in kafka_batches.batches_of(data) if b.offset >= first and b.base_offset <= until
            ]
            self.meter.take(BatchedRecords(batches, first))
        else:
            self.meter.take([r for r in kafka_batches.records_of(data) if first <= r.offset <= until])

    def flush(self, now):
        """What it decided, in a form that can be compared, and committed."""
        while lacking := self.meter.windows_lacking_past():
            for ref in lacking:
                self.meter.add_past(ref, self._past(ref))
        flush = self.meter.build_flush(now)
        if flush is None:
            return None
        rows = list(zip(*flush.rows, strict=True)) + (rows_of(flush.block) if flush.block is not None else [])
        assert len(rows) == flush.accepted
        rows = {row[2]: dict(zip(EVENT_COLUMNS, row, strict=True)) for row in rows}
        assert len(rows) == flush.accepted
        self.ledger.update(rows)
        changelog = dict(flush.changelog)  # a key may be written and deleted: the last one counts
        for key, value in changelog.items():
            if value is None:
                self.state.pop(key, None)
            else:
                self.state[key] = value
        self.meter.committed(flush)
        return {
            "rows": rows,
            "changelog": changelog,
            "snapshots": sorted(flush.snapshots, key=lambda s: (s.ref.start, s.ref.client_id)),
            "totals": flush.totals,
            "progress": flush.progress,
            "dead": [(letter(d.record), d.reason, d.detail) for d in flush.dead_letters],
            "meta": flush.meta,
            "counts": (flush.accepted, flush.duplicates, flush.late, flush.late_reopened),
        }

    def _past(self, ref):
        applied, sums = self.meter.meta.applied_offset, dict(self.forgotten)
        for offset, row in self.ledger.items():
            if (
                offset <= applied
                and row["client_id"] == ref.client_id
                and ref.start <= row["occurred_at"] < ref.end
            ):
                total = sums.setdefault(row["sku"], SkuTotal())
                if row["billable"]:
                    total.count += 1
                    total.credits_micro += row["credits_micro"]
                else:
                    total.free_count += 1
                    total.free_credits_micro += row["credits_micro"]
        return sums

    def memory(self):
        """A look at the sums brings them up to date: not to be taken in between what must do without."""
        return self.meter.kept_windows(), self.meter.open_windows, self.position()

    def position(self):
        return self.meter.watermark, self.meter.next_offset, self.meter.pending


def letter(record):
    return record.offset, record.timestamp, record.key, record.value, tuple(map(tuple, record.headers))


options_of_a_worker = st.builds(
    MeteringSettings,
    window_length_ms=st.just(LENGTH),
    dedupe_horizon_ms=st.just(HORIZON),
    allowed_lateness_ms=st.sampled_from([0, 500]),
    grace_ms=st.sampled_from([0, 700]),
    keep_closed_windows_ms=st.sampled_from([0, 2_000, 10**9]),
    late_snapshot_interval_ms=st.sampled_from([0, 3_000]),
)
steps = st.lists(
    st.tuples(
        st.integers(1, 10),
        st.sampled_from(["take", "flush", "flush", "crash", "one by one"]),
        st.sampled_from([0, 1_000, 4_000]),
        options_of_a_worker,
    ),
    max_size=8,
)


def first_state(total=0, lengths=WindowLengths.of(LENGTH)):  # noqa: B008 - immutable
    """Where a partition stands that has a client and a window with sums near the end of int64, or none."""
    meta = Meta("cluster", "topic", FIRST - 1, 0, 0, lengths, Counters(first_offset=FIRST))
    state = {meta_key(0): meta.to_bytes()}
    if total:
        sums = SkuTotal(1, total)
        state[aggregate_key(0, START, "a", "x")] = aggregate_value(sums)
        state[total_key(0, "b")] = total_value(sums, 1)
    return state


def lowered(limits):
    """The limits of both meters, SKUs of a window and the end of int64, where a few events reach them."""
    stack = ExitStack()
    for module in (meter_module, batch_meter):
        for name, limit in zip(("SKUS_PER_WINDOW_MAX", "INT64_MAX"), limits, strict=True):
            stack.enter_context(patch.object(module, name, limit))
    return stack


LIMITS = (SKUS_PER_WINDOW_MAX, 2**63 - 1)

ONE_LENGTH = WindowLengths.of(LENGTH)
lengths_of_windows = st.sampled_from(
    [ONE_LENGTH] * 2
    + [
        ONE_LENGTH.changed(2_000, 0, START),
        ONE_LENGTH.changed(500, 0, START - 20_000).changed(1_500, 0, START + 5_000),
    ]
)
"""The second one changes amid the events, the third also amid the late ones."""


@settings(max_examples=300, deadline=None)
@given(
    logs(),
    options_of_a_worker,
    steps,
    st.sampled_from(
        [(0, LIMITS)] * 2
        + [(2**63 - 9, LIMITS), (2**63 - 2 * CREDITS_MICRO_MAX, LIMITS), (0, (1, 2**63 - 1)), (0, (2, 80))]
    ),
    lengths_of_windows,
)
def test_the_fast_meter_says_what_the_plain_one_says(log, options, plan, total_and_limits, lengths):
    """Rows, windows, totals, progress, duplicates, dead letters with reasons and bytes, changelog, memory."""
    total, limits = total_and_limits
    with lowered(limits):
        compare(log, options, plan, first_state(total, lengths))


def compare(log, options, plan, state):
    data, offsets = log
    sides = [Side(fast, options, state) for fast in (False, True)]
    now = START
    for count, step, pause, changed in [*plan, (len(offsets) + 1, "flush", 10_000, options)]:
        now += pause
        ahead = [offset for offset in offsets if offset >= sides[0].meter.next_offset]
        for side in sides if ahead else ():
            if step == "one by one":  # and the next batch begins below what was taken
                side.take(data, ahead[:count][-1], in_batches=False)
            else:
                side.take(data, _end_of_batch(data, ahead[:count][-1]))
        said = [side.flush(now) for side in sides] if step == "flush" else None
        if step == "crash":
            for side in sides:
                side.restart(changed)
        if said is not None:
            plain, fast = said

            assert plain == fast
            assert sides[0].memory() == sides[1].memory()

        assert sides[0].position() == sides[1].position()
        assert sides[0].state == sides[1].state


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
    st.sampled_from([False, False, True]),  # a new batch begins
    st.sampled_from([False, True]),  # and a flush, or else it is fed while others wait
)


@settings(max_examples=150, deadline=None)
@given(st.lists(visits, max_size=20), st.sampled_from([(1, 2**63 - 1), (2, 2**63 - 1), (4_000, 4)]))
def test_limits_of_windows_that_come_back_are_the_same(visited, limits):
    """The kernel adds up without their past: it must stop where a sum with it could pass a limit."""
    batches = []
    for number, (window, sku, credits_micro, new, flush) in enumerate(visited):
        event = UsageEvent(f"e{number}", "a", "task", sku, credits_micro, LENGTH * (window - 5))
        if new or not batches:
            batches.append(([], flush))
        value = encoded(event, CODEC.heads(1)[0], START)
        batches[-1][0].append((FIRST + number, START, None, value, []))
    sides = [Side(fast, FORGETFUL, first_state()) for fast in (False, True)]
    now = START
    with lowered(limits):
        for records, flush in batches:
            now += 1_000
            for side in sides:
                side.take(kafka_batches.batch(records[0][0], records), records[-1][0])
            if flush:
                plain, fast = (side.flush(now) for side in sides)

                assert plain == fast
                assert sides[0].memory() == sides[1].memory()
            assert sides[0].position() == sides[1].position()
        plain, fast = (side.flush(now + 9_000) for side in sides)

    assert plain == fast
    assert sides[0].ledger == sides[1].ledger


def test_what_a_kernel_adds_to_a_window_that_comes_back_is_added_to_its_past():
    """The past is there while the records that waited for it are decided, and not a step longer."""
    sides = [Side(fast, FORGETFUL, first_state()) for fast in (False, True)]
    for number, window in enumerate((0, 90, 0)):
        event = UsageEvent(f"e{number}", "a", "task", "x", 7, LENGTH * window)
        record = FIRST + number, START, None, encoded(event, CODEC.heads(1)[0], START), []
        for side in sides:
            side.take(kafka_batches.batch(record[0], [record]), record[0])
        plain, fast = (side.flush(START + 10_000 * number) for side in sides)

        assert plain == fast
    assert [snapshot.skus["x"].credits_micro for snapshot in fast["snapshots"]] == [14]


def test_what_many_chunks_change_is_all_in_the_flush_behind_them():
    """Each chunk opens a window: more of them than the arrays made for the first chunk can hold."""
    sides = [Side(fast, FORGETFUL, first_state()) for fast in (False, True)]
    for number in range(20):
        event = UsageEvent(f"e{number}", "a", "task", "x", 7, LENGTH * number)
        record = FIRST + number, START, None, encoded(event, CODEC.heads(1)[0], START), []
        for side in sides:
            side.take(kafka_batches.batch(record[0], [record]), record[0])
    plain, fast = (side.flush(START + 10_000) for side in sides)

    assert plain == fast
    assert sum(snapshot.skus["x"].count for snapshot in fast["snapshots"]) == 19


def _end_of_batch(data, offset):
    """Chunks end where batches do."""
    return next(b.offset for b in kafka_batches.batches_of(data) if b.offset >= offset)


@settings(max_examples=60, deadline=None)
@given(logs())
def test_batches_hold_the_records_that_aiokafka_reads(log):
    """The one-by-one reading of a batch is what odd records go through."""
    data, _ = log

    expected = [letter(record) for record in kafka_batches.records_of(data)]
    assert expected == [letter(r) for r in BatchedRecords(kafka_batches.batches_of(data))]


def test_a_window_of_too_many_skus_is_refused_alike():
    """The kernel knows no window: it must ask before a window could become too wide."""
    limit = SKUS_PER_WINDOW_MAX
    options = MeteringSettings(window_length_ms=LENGTH, allowed_lateness_ms=0)
    data, offset = b"", FIRST
    for _ in range(3):
        records = []
        for _ in range(limit // 2 + 10):
            event = UsageEvent(f"e{offset}", "a", "task", f"sku-{offset % (limit + 15)}", 1, 0)
            records.append((offset, START, None, encoded(event, CODEC.heads(1)[0], START), []))
            offset += 1
        data += kafka_batches.batch(records[0][0], records)
    sides = [Side(fast, options, first_state()) for fast in (False, True)]
    for side in sides:
        side.take(data, offset)
    plain, fast = (side.flush(START) for side in sides)

    assert plain == fast
    assert {reason for _, reason, _ in plain["dead"]} == {"too_many_skus"}


@pytest.mark.parametrize(
    ("past", "sku", "reason"),
    [
        ({f"s{number}": SkuTotal(1, 1) for number in range(SKUS_PER_WINDOW_MAX)}, "x", "too_many_skus"),
        ({f"s{number}": SkuTotal(1, 1) for number in range(SKUS_PER_WINDOW_MAX)}, "s1", None),
        ({"x": SkuTotal(1, 2**63 - 2)}, "x", "window_total_out_of_range"),
        ({"x": SkuTotal(1, 2**63 - 3)}, "x", None),
    ],
    ids=["4,001st SKU", "a SKU it has", "beyond int64", "up to int64"],
)
def test_a_window_that_comes_back_is_judged_with_its_past_alike(past, sku, reason):
    """The kernel adds up without it: it must know how little more the window can take."""
    options = MeteringSettings(window_length_ms=LENGTH, allowed_lateness_ms=0)
    events = [
        UsageEvent("e0", "a", "task", "y", 1, 0),
        UsageEvent("e1", "a", "task", sku, 2, -5 * LENGTH),
        UsageEvent("e2", "b", "task", sku, 2, 0),
    ]
    records = [
        (FIRST + number, START, None, encoded(event, CODEC.heads(1)[0], START), [])
        for number, event in enumerate(events)
    ]
    data = b"".join(
        kafka_batches.batch(part[0][0], part)
        for part in (records[:1], records[1:])  # the first ends the window
    )
    sides = [Side(fast, options, first_state()) for fast in (False, True)]
    for side in sides:
        side.forgotten = {sku: total.copy() for sku, total in past.items()}
        side.take(data, FIRST)
        side.take(data, FIRST + 2)
        assert (side.meter.pending, list(side.meter.windows)) == (3, [(START, "a")])
    plain, fast = (side.flush(START) for side in sides)

    assert plain == fast
    assert [reason] * bool(reason) == [why for _, why, _ in fast["dead"]]


@pytest.mark.parametrize(("age", "accepted"), [(HORIZON, 1), (HORIZON + 1, 2)])
def test_the_edge_of_the_horizon_is_the_same(age, accepted):
    """A copy that is exactly as old as the horizon is one; random times seldom meet that millisecond."""
    event = UsageEvent("e", "a", "task", "x", 1, 0)
    data = b"".join(
        kafka_batches.batch(
            FIRST + number, [(FIRST + number, at, None, encoded(event, CODEC.heads(1)[0], at), [])]
        )
        for number, at in enumerate((START, START + age))
    )
    sides = [Side(fast, MeteringSettings(dedupe_horizon_ms=HORIZON), first_state()) for fast in (False, True)]
    for side in sides:
        side.take(data, FIRST + 1)
    plain, fast = (side.flush(START) for side in sides)

    assert plain == fast
    assert fast["counts"][0] == accepted


@pytest.mark.parametrize("crowd", [0, 2 * slices.ASKED_AT_ONCE_MIN], ids=["alone", "in a crowd"])
@pytest.mark.parametrize(
    ("age", "credits_charged"), [(SLICE, 7), (HORIZON // 2, 7), (HORIZON, 7), (HORIZON + 1, 14)]
)
def test_a_copy_is_charged_once_whatever_slice_its_first_is_in(age, credits_charged, crowd):
    """Each flush closes a slice: the first stands in memory, in a file behind others, in one that leaves. The
    copy comes alone, or with so many others that the files are asked of all at once.
    """
    first = UsageEvent("e", "a", "task", "x", 7, 0)
    chunks = [*range(0, age, SLICE)]
    moments = [*chunks, *(age - 1 for _ in range(crowd)), age]
    data = b"".join(
        kafka_batches.batch(
            FIRST + number, [(FIRST + number, START + at, None, encoded(event, CODEC.heads(1)[0], START), [])]
        )
        for number, at in enumerate(moments)
        for event in (first if at in {0, age} else first._replace(event_id=f"other-{number}"),)
    )
    sides = [Side(fast, MeteringSettings(dedupe_horizon_ms=HORIZON), first_state()) for fast in (False, True)]
    for side in sides:
        for number in [*range(len(chunks)), len(moments) - 1]:
            side.take(data, FIRST + number)
            side.flush(START)
        charged = sum(row["credits_micro"] for row in side.ledger.values() if row["event_id"] == "e")

        assert charged == credits_charged


def test_a_copy_as_old_as_the_horizon_is_charged_once_wherever_in_its_slice_the_first_stands():
    """With a flush for each event, of four in a slice: one slice that left too early would charge its last
    ones twice, one that stayed too long would hold more than the horizon and what two slices span.
    """
    step, horizon = SLICE // 4, MeteringSettings(dedupe_horizon_ms=HORIZON)
    sides = [Side(fast, horizon, first_state()) for fast in (False, True)]
    for number in range(3 * HORIZON // (2 * step)):
        at, offset = START + number * step, FIRST + 2 * number
        events = [
            UsageEvent(f"e{of}", "a", "task", "x", 7, 0)
            for of in (number, number - HORIZON // step)
            if of >= 0
        ]
        records = [
            (offset + place, at, None, encoded(event, CODEC.heads(1)[0], at), [])
            for place, event in enumerate(events)
        ]
        for side in sides:
            side.take(kafka_batches.batch(offset, records), offset + 1)
            side.flush(START)
            credits_micro = sum(row["credits_micro"] for row in side.ledger.values())

            assert credits_micro == 7 * (number + 1)
            assert len(side.meter.seen) <= (HORIZON + 2 * SLICE) // step


def test_a_sum_near_its_limit_is_known_after_plain_records():
    """Records that come one by one before the first batch must not pass for all that the sums hold."""
    total = 2**63 - 1
    event = UsageEvent("e0", "a", "task", "y", 1, 0)
    data = b"".join(
        kafka_batches.batch(
            FIRST + number, [(FIRST + number, START, None, encoded(one, CODEC.heads(1)[0], START), [])]
        )
        for number, one in enumerate((event, event._replace(client_id="b", event_id="e1")))
    )
    sides = [
        Side(fast, MeteringSettings(window_length_ms=LENGTH), first_state(total)) for fast in (False, True)
    ]
    for side in sides:
        side.take(data, FIRST, in_batches=False)
        side.take(data, FIRST + 1)
    plain, fast = (side.flush(START) for side in sides)

    assert plain == fast
    assert [reason for _, reason, _ in fast["dead"]] == ["lifetime_total_out_of_range"]
