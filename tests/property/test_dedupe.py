"""The dedupe index against a plain list: what is found depends on the records alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.dedupe import SLICES_PER_HORIZON, DedupeIndex

HORIZON = 2_400
SLICE = HORIZON // SLICES_PER_HORIZON
logs = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 99, 100, 700, HORIZON, HORIZON + 1]),
        st.integers(0, 4),
        st.integers(0, 2**64 - 1),
    )
)


def timed(log):
    now = 10_000
    for step, identity, digest in log:
        now += step
        yield now, identity, digest


@given(logs)
def test_a_copy_is_found_exactly_within_the_horizon(log):
    """Neither earlier forgotten nor longer remembered, whenever memory was tidied."""
    index, accepted = DedupeIndex(HORIZON), []
    for now, identity, digest in timed(log):
        expected = next((d for at, i, d in reversed(accepted) if i == identity and now - at <= HORIZON), None)

        assert expected == index.find(identity, now)

        if expected is None:
            index.add(identity, digest, now)
            accepted.append((now, identity, digest))


@given(logs, st.randoms(use_true_random=False))
def test_a_rebuilt_index_says_what_the_living_one_says(log, random):
    """Rows come from the ledger in any order, and older ones than the horizon not at all."""
    living, rows, newest = DedupeIndex(HORIZON), [], 0
    for now, identity, digest in timed(log):
        newest = now
        if living.find(identity, now) is None:
            living.add(identity, digest, now)
            rows.append((identity, digest, now))
    rows = [row for row in rows if row[2] >= newest - HORIZON]
    random.shuffle(rows)
    rebuilt = DedupeIndex(HORIZON)
    rebuilt.add_all(*([row[column] for row in rows] for column in range(3)))

    for identity in range(5):
        for later in (0, 1, SLICE, HORIZON // 2, HORIZON):
            assert living.find(identity, newest + later) == rebuilt.find(identity, newest + later)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=200))
def test_memory_holds_the_horizon_and_a_slice(steps):
    """Bounded: one id a step, none older than the horizon and two slices."""
    index, now, times = DedupeIndex(HORIZON), 10_000, []
    for number, step in enumerate(steps):
        now += step
        index.add(number, 0, now)
        times.append(now)

    assert len(index) <= sum(at >= now - HORIZON - 2 * SLICE for at in times)
