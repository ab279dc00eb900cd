"""When a generation of buckets ends and when the next opens, as pure rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meterline.errors import PartitionHalted
from meterline.quota.generation import Generation, judge, log_clock, may_open
from meterline.quota.scripts import ShardState
from meterline.quota.state import Meta

KNOWN = Generation(number=7, beat=3, closed_at=1_000)
GOOD = ShardState(
    server_run="run",
    run="run",
    generation=7,
    open=True,
    beat=3,
    partitions=2,
    topic_id="t",
    skew_ms=0,
    published_until={},
    accounted_until={("t", 0): 5_000, ("t", 1): 4_000},
)


def test_what_redis_holds_is_believed_when_nothing_went_back():
    """Also a heartbeat that was written and not yet remembered."""
    assert judge(KNOWN, [GOOD, replace(GOOD, beat=4)], durable=False).lost == ""


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"generation": 0, "run": ""}, "generation 0"),
        ({"generation": 8}, "generation 8"),
        ({"beat": 2}, "went back to heartbeat 2 from 3"),
        ({"server_run": "another"}, "restarted"),
    ],
)
def test_one_shard_that_is_not_what_it_was_is_enough(changed, why):
    """A client of it could get credits twice."""
    assert why in judge(KNOWN, [GOOD, replace(GOOD, **changed)], durable=False).lost


@pytest.mark.parametrize(
    ("then", "now", "lost"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_a_restart_is_excused_only_where_every_write_was_on_disk(then, now, lost):
    """When the generation began, and now."""
    verdict = judge(replace(KNOWN, durable=then), [GOOD, replace(GOOD, server_run="new")], durable=now)

    assert bool(verdict.lost) == lost
    assert verdict.restarted == (() if lost else (1,))


def test_the_log_clock_is_the_slowest_partition_and_unknown_while_one_is():
    """Of the present topic: a former one accounts for nothing that is published now."""
    assert log_clock(GOOD) == 4_000
    assert log_clock(replace(GOOD, partitions=3)) is None
    assert log_clock(replace(GOOD, topic_id="new")) is None
    assert log_clock(replace(GOOD, partitions=0)) is None


@pytest.mark.parametrize(
    ("after_open", "clock", "opens"), [(False, 0, True), (True, 1_000 + 600 + 49, False), (True, 1_650, True)]
)
def test_a_later_generation_waits_for_the_last_forgotten_hold(after_open, clock, opens):
    """Begun at 1,000; a hold stands at most 600; clocks differ by 50."""
    state = replace(GOOD, accounted_until={("t", 0): clock, ("t", 1): clock})

    assert may_open(state, replace(KNOWN, after_open=after_open), 600, 50) is opens


def test_the_next_generation_is_above_every_known_number():
    """Of ours, of what stands in Redis, and of the clock, whichever is largest."""
    assert KNOWN.next([], 5, durable=False).number == 8
    assert KNOWN.next([replace(GOOD, generation=90)], 5, durable=False).number == 91
    assert KNOWN.next([GOOD], 1_000_000, durable=False).number == 1_000_000


def test_only_a_generation_without_an_open_one_before_is_a_first_one():
    """One that was never opened had no holds."""
    never_open = Generation().next([], 5, durable=False)

    assert not never_open.after_open
    assert not never_open.next([], 6, durable=False).after_open
    assert replace(never_open, opened=True).next([], 6, durable=False).after_open
    assert Generation().next([GOOD], 5, durable=False).after_open


def test_it_stands_in_the_changelog_as_it_is_and_a_newer_format_is_refused():
    """A version that doesn't understand the state must not act on it."""
    assert Generation.from_bytes(KNOWN.to_bytes()) == KNOWN
    assert Generation.from_bytes(None) == Generation()
    assert Meta.from_bytes(Meta("t", 5).to_bytes()) == Meta("t", 5)
    for newer in (replace(KNOWN, format_version=9), Meta("t", 5, format_version=9)):
        with pytest.raises(PartitionHalted, match="format 9"):
            type(newer).from_bytes(newer.to_bytes())
