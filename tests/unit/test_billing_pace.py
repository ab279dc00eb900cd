"""Billing workers share the account's limit: together they never exceed it, whoever owns what."""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterline.billing.pace import AHEAD_S, CAUGHT_UP_S, USED_SHARE, Pace


class JumpingLoop(asyncio.SelectorEventLoop):
    """Where nothing is to do until some time, it is that time at once."""

    def __init__(self):
        self.now = 1_000.0
        super().__init__(_NeverWaiting(self))

    def time(self):
        return self.now


class _NeverWaiting(selectors.SelectSelector):
    def __init__(self, loop):
        super().__init__()
        self._loop = loop

    def select(self, timeout=None):
        self._loop.now += timeout or 0.0
        return super().select(0)


@pytest.fixture
def loop():
    loop = JumpingLoop()
    yield loop
    loop.close()


def paces(loop, limit, partitions, workers):
    """Of so many workers, the partitions dealt out in turn."""
    made = [Pace(limit, clock=loop.time) for _ in range(workers)]
    for pace in made:
        pace.partitions = partitions
    for partition in range(partitions):
        made[partition % workers].own(partition)
    return made


async def busy(loop, pace, seconds, departures):
    """A worker with more to send than it may: plans as a flush does, every 150 ms."""
    end, calls = loop.time() + seconds, []

    async def call():
        await pace.departure()
        departures.append(loop.time())

    while loop.time() < end:
        for _ in range(pace.room()):
            pace.plan()
            calls.append(asyncio.ensure_future(call()))
        await asyncio.sleep(0.15)
    for one in calls:
        one.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def most_in_a_second(departures):
    ordered = sorted(departures)
    first, most = 0, 0
    for number, at in enumerate(ordered):
        while at - ordered[first] >= 1.0:
            first += 1
        most = max(most, number - first + 1)
    return most


@pytest.mark.parametrize(
    ("limit", "partitions", "workers"), [(25, 4, 1), (25, 4, 2), (25, 4, 3), (100, 16, 5), (1_000, 8, 3)]
)
def test_busy_workers_use_the_limit_and_never_more(loop, limit, partitions, workers):
    """In any second at most the used share of the limit, and one request of each worker to begin with."""
    departures, seconds = [], 10
    made = paces(loop, limit, partitions, workers)

    async def all_busy():
        await asyncio.gather(*(busy(loop, pace, seconds, departures) for pace in made))

    loop.run_until_complete(all_busy())

    assert most_in_a_second(departures) <= limit * USED_SHARE * (1 + CAUGHT_UP_S) + workers
    assert len(departures) == pytest.approx(limit * USED_SHARE * seconds, rel=0.03)


def test_what_a_stalled_loop_missed_is_not_made_up_for(loop):
    """Its requests leave one after the other, not together: a second has no more of them for the stall."""
    (pace,) = paces(loop, 100, 4, 1)
    departures = []

    async def stall():
        working = asyncio.ensure_future(busy(loop, pace, 5, departures))
        await asyncio.sleep(1)
        loop.now += 3.0
        await working

    loop.run_until_complete(stall())

    assert most_in_a_second(departures) <= 100
    assert len(departures) < 3 * 100


@given(
    st.floats(0.1, 1_000),
    st.integers(1, 16),
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 4)), max_size=30),
)
def test_shares_never_add_up_to_more_than_the_limit(limit, partitions, moves):
    """Partitions go from worker to worker: the one before has lost it when the next one gets it."""
    workers = [Pace(limit) for _ in range(5)]
    owner = {}
    for pace in workers:
        pace.partitions = partitions
    for partition, worker in moves:
        if partition < partitions:
            if partition in owner:
                owner[partition].disown(partition)
            owner[partition] = workers[worker]
            workers[worker].own(partition)

        together = sum(pace.per_second for pace in workers)
        assert together == pytest.approx(limit * len(owner) / partitions)
        assert together <= limit * (1 + 1e-9)


def test_a_worker_without_a_partition_plans_nothing(loop):
    """Its share is nothing; who still asks something is not kept waiting for ever."""
    pace = Pace(25, clock=loop.time)
    pace.own(3)
    assert pace.room() == math.floor(AHEAD_S * 25 * USED_SHARE) + 1

    pace.disown(3)

    assert (pace.room(), pace.per_second) == (0, 0.0)
    pace.wait()


def test_a_slow_pace_plans_one_and_then_none_for_long(loop):
    """Once in ten seconds: what is planned leaves soon, or its commit would be too old."""
    (pace,) = paces(loop, 0.1, 1, 1)
    assert pace.room() == 1
    pace.plan()

    loop.run_until_complete(pace.departure())

    assert pace.room() == 0
    loop.now += 1 / (0.1 * USED_SHARE) - AHEAD_S + 0.1
    assert pace.room() == 1


def test_requests_that_were_planned_and_given_up_make_room(loop):
    """A lost partition's, before or while they wait for their turn."""
    (pace,) = paces(loop, 25, 4, 1)
    room = pace.room()
    pace.plan()
    pace.unplan()
    pace.plan()

    async def give_up():
        await pace.departure()
        pace.plan()
        waiting = asyncio.ensure_future(pace.departure())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    loop.run_until_complete(give_up())
    loop.now += AHEAD_S

    assert pace.room() == room


def test_threads_that_ask_keep_the_distance():
    """Reads of several partitions, each in a thread of its own: in real time, a tenth of a second."""
    pace, departures = Pace(200), []
    pace.own(0)

    def ask():
        for _ in range(5):
            pace.wait()
            departures.append(pace._clock())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = max(departures) - min(departures)

    assert took >= 19 / (200 * USED_SHARE) - 0.001 - CAUGHT_UP_S
    assert all(before <= after for before, after in pairwise(sorted(departures)))
