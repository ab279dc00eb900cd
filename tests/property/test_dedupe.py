"""The dedupe indexes against a plain list: what is found depends on the records alone."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ledger_rows import dedupe_columns

from meterline.domain.dedupe import SLICES_PER_HORIZON
from meterline.errors import PartitionHalted
from meterline.metering import slices
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import BYTES_PER_ID, SliceFiles

HORIZON = 2_400
SLICE = HORIZON // SLICES_PER_HORIZON
logs = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 99, 100, 700, HORIZON, HORIZON + 1]),
        st.integers(0, 4),
        st.integers(0, 2**64 - 1),
    )
)


def files(bytes_max=2**30):
    return SliceFiles(Path(tempfile.gettempdir()), bytes_max, HORIZON)


def array_index():
    from meterline.metering.fast.index import ArrayIndex  # noqa: PLC0415 - needs the extra `fast`

    return ArrayIndex(files())


INDEXES = {"plain": lambda: SlicedIndex(files())}
if find_spec("numba") is not None:
    INDEXES["fast"] = array_index

each_index = pytest.mark.parametrize("make", INDEXES.values(), ids=INDEXES)


def columns_of(rows):
    """Of (identity, payload digest, append time), as the ledger answers them."""
    names = ("identity_hash", "payload_digest", "appended_at")
    return dedupe_columns(dict(zip(names, row, strict=True)) for row in rows)


def timed(log):
    now = 10_000
    for step, identity, digest in log:
        now += step
        yield now, identity, digest


@each_index
@settings(deadline=None)  # the first call may load kernels
@given(logs, st.sets(st.integers(0, 50)))
def test_a_copy_is_found_exactly_within_the_horizon(make, log, flushes):
    """Neither earlier forgotten nor longer remembered, whenever memory was tidied and slices were closed."""
    index, accepted = make(), []
    for number, (now, identity, digest) in enumerate(timed(log)):
        if number in flushes:
            index.close_slice(now)
        expected = next((d for at, i, d in reversed(accepted) if i == identity and now - at <= HORIZON), None)

        assert expected == index.find(identity, now)

        if expected is None:
            index.add(identity, digest, now)
            accepted.append((now, identity, digest))


@each_index
@settings(deadline=None)  # the first call may load kernels
@given(logs, st.randoms(use_true_random=False))
def test_a_rebuilt_index_says_what_the_living_one_says(make, log, random):
    """Rows come from the ledger in any order, and older ones than the horizon not at all."""
    living, rows, newest = make(), [], 0
    for now, identity, digest in timed(log):
        newest = now
        if living.find(identity, now) is None:
            living.add(identity, digest, now)
            rows.append((identity, digest, now))
        living.close_slice(now)
    rows = [row for row in rows if row[2] >= newest - HORIZON]
    random.shuffle(rows)
    rebuilt = make()
    middle = newest - HORIZON // 2
    for part in ([row for row in rows if row[2] < middle], [row for row in rows if row[2] >= middle]):
        rebuilt.add_all(*columns_of(part))

    for identity in range(5):
        for later in (0, 1, SLICE, HORIZON // 2, HORIZON):
            assert living.find(identity, newest + later) == rebuilt.find(identity, newest + later)


@each_index
@settings(deadline=None)  # the first call may load kernels
@given(st.lists(st.integers(0, 300), min_size=1, max_size=200))
def test_the_index_holds_the_horizon_and_a_slice(make, steps):
    """Bounded: one id a step, none older than the horizon and what two slices span."""
    index, now, times = make(), 10_000, []
    for number, step in enumerate(steps):
        now += step
        index.add(number, 0, now)
        index.close_slice(now)
        times.append(now)

    assert len(index) <= sum(at >= now - HORIZON - 2 * SLICE - 2 * max(steps) for at in times)


@each_index
@pytest.mark.parametrize("step", [3, SLICE // 4, SLICE + 1])
def test_a_slice_leaves_neither_one_too_early_nor_one_too_late(make, step):
    """Wherever in its slice an id stands: a copy exactly as old as the horizon is found, at each moment; and
    once a slice is closed, nothing is held from before the horizon and the span of one.
    """
    index, times = make(), range(10_000, 10_000 + 2 * HORIZON, step)
    for number, now in enumerate(times, 1):
        index.add(number, number, now)
        oldest = max(1, number - HORIZON // step)
        assert [index.find(copy, now) for copy in (oldest - 1, oldest, number)] == [None, oldest, number]
        closed = index._files._slices[-1:]
        index.close_slice(now)
        if index._files._slices[-1:] != closed:
            held = sum(at >= now - HORIZON - SLICE - step for at in times[:number])
            assert len(index) <= held, now - times[0]


@each_index
def test_an_id_of_each_slice_is_found_among_many(make):
    """A day of ids in 24 files and in memory: every one with its own payload, and no other."""
    index, each = make(), 500
    for number in range(each * SLICES_PER_HORIZON):
        now = 10_000 + number * SLICE // each
        index.add(_spread(number), number, now)
        index.close_slice(now)

    assert [index.find(_spread(number), now) for number in range(each * SLICES_PER_HORIZON)] == [
        *range(each * SLICES_PER_HORIZON)
    ]
    assert {index.find(_spread(-1 - number), now) for number in range(2_000)} == {None}
    may_be_older = index.may_be_older([_spread(number) for number in range(-2_000, each)])
    assert may_be_older == [False] * 2_000 + [True] * each
    assert {index.find(_spread(number) ^ 1 << 64, now) for number in range(2_000)} == {None}


@each_index
@settings(deadline=None)  # the first call may load kernels
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2 * HORIZON), st.integers(0, 2**64 - 1))),
    st.integers(0, 2 * HORIZON),
)
def test_of_an_id_that_stands_twice_the_later_copy_counts(make, rows, now):
    """Where the horizon has become longer, both are within: whatever their order in the ledger's answer."""
    index = make()
    index.add_all(*columns_of((identity, digest, at) for identity, at, digest in rows))

    for identity in range(4):
        copies = [(at, digest) for i, at, digest in rows if i == identity and at >= now - HORIZON]
        newest = {digest for at, digest in copies if at == max(copies)[0]}
        assert (index.find(identity, now) in newest) if newest else index.find(identity, now) is None


def test_a_clock_that_jumped_makes_no_slice_wrong(monkeypatch):
    """Ids of a slice whose times three bytes can't tell apart lie in several files."""
    monkeypatch.setattr(slices, "TIME_BITS", 8)
    index = SlicedIndex(files())
    for number in range(40):
        index.add(number, number, 10_000 + number % 4 * 500)
    index.close_slice(11_500)
    index.add(40, 40, 11_600)
    index.close_slice(11_700)

    assert [index.find(number, 11_700) for number in range(41)] == [*range(41)]


def test_at_the_limit_nothing_is_forgotten(tmp_path):
    """The partition halts, and the text names both ways on."""
    index = SlicedIndex(SliceFiles(tmp_path, 100 * BYTES_PER_ID, HORIZON))
    for number in range(101):
        index.add(number, number, 10_000)
        if number == 50:
            index.close_slice(10_000)
            index.close_slice(10_000 + SLICE)
    index.close_slice(10_000 + 2 * SLICE)
    with pytest.raises(PartitionHalted, match=r"DEDUPE_DISK_BYTES_MAX.*DEDUPE_HORIZON_MS"):
        index.close_slice(10_000 + 3 * SLICE)

    assert [index.find(number, 10_000 + HORIZON) for number in range(101)] == [*range(101)]


def test_a_disk_that_refuses_halts_the_partition(tmp_path):
    """No slice is given up because there is no room for it."""
    (tmp_path / "file").touch()
    index = SlicedIndex(SliceFiles(tmp_path / "file" / "folder", 2**30, HORIZON))
    index.add(1, 2, 10_000)
    index.close_slice(10_000)
    with pytest.raises(PartitionHalted, match="DEDUPE_DIR"):
        index.close_slice(10_000 + SLICE)

    assert index.find(1, 10_000 + HORIZON) == 2


def test_a_slice_leaves_nothing_behind(tmp_path):
    """Files have no name: nobody can read an old one, and a killed worker fills no disk."""
    index = SlicedIndex(SliceFiles(tmp_path, 2**30, HORIZON))
    index.add(1, 2, 10_000)
    index.close_slice(10_000)
    index.close_slice(10_000 + SLICE)

    assert index.find(1, 10_000 + SLICE) == 2
    assert list(tmp_path.iterdir()) == []


def _spread(number):
    return number * 0x9E3779B97F4A7C15F39CC060 % 2**96
