"""Windows whose length changes: each time is in one of them, and the windows tell what the lengths were."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.window_lengths import WindowLengths

MINUTE = 60_000
END = 3_000 * MINUTE
sizes = st.sampled_from([1, 2, 3, 5, 10, 15, 20, 30, 60])
wishes = st.lists(st.tuples(sizes, st.integers(0, END // 2), st.integers(0, END // 2)), max_size=6)


def lengths_of(first, wished):
    lengths = WindowLengths.of(first * MINUTE)
    for size, since, not_before in wished:
        lengths = lengths.changed(size * MINUTE, since, not_before)
    return lengths


def windows_until(lengths, end):
    start, windows = 0, []
    while start < end:
        windows.append((start, lengths.end_of(start)))
        start = windows[-1][1]
    return windows


@given(sizes, wishes, st.lists(st.integers(0, END - 1)))
def test_every_time_is_in_exactly_one_window(first, wished, times):
    """They tile time without gap or overlap, each aligned to its own length."""
    lengths = lengths_of(first, wished)
    windows = windows_until(lengths, END)

    assert all(start % (end - start) == 0 for start, end in windows)
    for time in times:
        start = lengths.start_of(time)
        assert (start, lengths.end_of(start)) in windows
        assert start <= time < lengths.end_of(start)


@given(sizes, wishes, sizes, st.integers(0, END), st.integers(0, END))
def test_a_change_moves_no_window_of_before(first, wished, size, since, not_before):
    """What may hold events already stays as it is, and what is later has the new length."""
    before = lengths_of(first, wished)
    after = before.changed(size * MINUTE, since, not_before)
    edge = after.newest.starts

    assert edge >= max(since, not_before)
    assert windows_until(before, edge) == windows_until(after, edge)
    assert {end - start for start, end in windows_until(after, edge + END) if start >= edge} == {
        size * MINUTE
    }


@given(sizes, wishes, st.data())
def test_windows_that_were_published_tell_the_lengths(first, wished, data):
    """A lost state: not each window was published, and every one that was is one of them again. (Of several
    changes some window of each must be among them.)
    """
    lengths = lengths_of(first, wished[:1])
    windows = windows_until(lengths, END)
    published = sorted(data.draw(st.sets(st.sampled_from(windows), min_size=1)))

    found = WindowLengths.from_windows(published)

    assert published == [(found.start_of(start), found.end_of(start)) for start, _ in published]
    assert all(one.starts <= two.starts for one, two in pairwise(found.changes))
