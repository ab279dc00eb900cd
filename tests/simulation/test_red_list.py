"""Each way in which metering is known to have gone wrong somewhere, and the credits that must come of it."""

from __future__ import annotations

import pytest
from tests.simulation.group import SESSION_S
from tests.simulation.histories import METERING_STEPS
from tests.simulation.scenes import scene
from tests.simulation.worker import LIMITS
from tests.simulation.world import SETTINGS

from meterline.streaming.steps import Step

SEEDS = range(2)
MESSAGES_OF_A_TAKE_OVER = 3
"""At least: fence, state, ranges."""


@pytest.fixture(params=SEEDS, ids="seed {}".format)
def told(request):
    """A running pipeline."""
    with scene(request.param) as running:
        yield running


def test_a_task_that_ran_again_in_another_window_is_charged_once(told):
    """Its id is the same, its time is not: the first one stands, in its window."""
    first = told.publish("task", 1_000)
    told.advance(2.5)
    told.publish("task", 1_000)

    assert told.credits_at_rest() == {"acme": 1_000}
    start = first.usage.occurred_at - first.usage.occurred_at % 1_000
    assert [(0, start, "acme")] == list(told.books.snapshots)


def test_a_copy_in_the_same_chunk_is_a_duplicate(told):
    for _ in range(3):
        told.publish("task", 1_000)

    assert told.credits_at_rest() == {"acme": 1_000}
    assert told.counted() == (1, 2, 0)


def test_a_copy_that_comes_during_the_flush_of_the_first_is_a_duplicate(told):
    """The ledger is away: the flush waits, and takes in goes on."""
    told.world.ledger.is_away = True
    told.publish("task", 1_000)
    told.advance()
    told.publish("task", 1_000)
    told.advance()

    assert told.credits_at_rest() == {"acme": 1_000}
    assert told.counted() == (1, 1, 0)


@pytest.mark.parametrize("restart_s", [0.3, 9.0], ids=["restarted", "taken over"])
def test_a_copy_that_comes_after_the_owners_death_is_a_duplicate(told, restart_s):
    """The index is rebuilt from the ledger, by the same process started again or by another."""
    told.publish("task", 1_000)
    told.until(lambda: told.counted() == (1, 0, 0))
    told.world.kill(told.owner().name, restart_s)
    told.publish("task", 1_000)
    told.advance(5)

    assert told.credits_at_rest() == {"acme": 1_000}
    assert told.counted() == (1, 1, 0)


def test_a_copy_that_comes_after_a_rebalance_is_a_duplicate(told):
    told.publish("task", 1_000)
    told.until(lambda: told.counted() == (1, 0, 0))
    for _ in range(3):
        told.world.group.rebalance()
        told.advance()
        told.publish("task", 1_000)

    assert told.credits_at_rest() == {"acme": 1_000}
    assert told.counted() == (1, 3, 0)


def test_of_two_amounts_in_one_chunk_the_first_stands(told):
    told.publish("task", 1_000)
    told.publish("task", 9_000)

    assert told.credits_at_rest() == {"acme": 1_000}
    assert told.counted() == (1, 0, 1)


def test_a_copy_beyond_the_horizon_or_in_another_partition_is_charged_again(told):
    """Twins: what the audit finds; here they must be in the ledger, never lost."""
    told.publish("task", 1_000)
    told.advance()
    told.publish("task", 1_000, partition=1)
    told.world.jump(61_000)
    told.publish("task", 1_000)

    assert told.credits_at_rest() == {"acme": 3_000}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_late_event_survives_the_death_before_its_snapshot(seed):
    """Committed, and its window not yet said again: the state remembers that it must be."""
    with scene(seed, SETTINGS.model_copy(update={"late_snapshot_interval_ms": 3_000})) as told:
        first = told.publish("first", 1_000)
        told.publish("closes it", 1, ago_ms=-1_500)
        told.until(lambda: told.books.snapshots)
        (window, said) = next(iter(told.books.snapshots.items()))
        told.publish("late", 70, ago_ms=told.world.wall_ms() - first.usage.occurred_at)
        told.until(lambda: told.counted() == (3, 0, 0))
        told.world.kill(told.owner().name)

        assert told.books.snapshots[window] == said, "the late event was told before the death"
        assert told.credits_at_rest() == {"acme": 1_071}


def test_a_late_event_between_a_close_and_its_commit_makes_another_snapshot(told):
    """The snapshot on its way says what it says; the next one has a later cutoff."""
    told.publish("first", 1_000)
    told.advance(0.6)
    told.publish("closes it", 1, ago_ms=-1_500)
    built = []

    def comes_late(worker, step):
        if step is Step.TRANSACTION_BEGUN and worker is told.owner() and not built:
            built.append(told.publish("late", 70, ago_ms=600))

    told.world.on_step = comes_late
    told.until(lambda: built)

    assert told.credits_at_rest() == {"acme": 1_071}


def test_an_event_that_comes_while_an_idle_partition_closes_is_charged(told):
    """Wall time closes windows only behind the end of the log: what comes in between is late, not lost."""
    told.publish("first", 1_000)
    idled = []

    def comes_then(worker, step):
        if step is Step.FLUSH_BUILT and worker is told.owner() and len(idled) < 5:
            idled.append(told.publish(f"then {len(idled)}", 10, ago_ms=1_500))

    told.until(lambda: told.counted() == (1, 0, 0))
    told.world.on_step = comes_then
    told.advance(5)

    assert told.credits_at_rest() == {"acme": 1_000 + 10 * len(idled)}
    assert len(idled) == 5


def test_an_event_far_ahead_closes_no_window_and_costs_nothing(told):
    told.publish("first", 1_000)
    told.publish("far ahead", 500, ago_ms=-(10**9))
    told.publish("second", 30)
    told.until(lambda: told.counted() == (2, 0, 1))

    assert told.books.meta(0).watermark <= told.world.wall_ms()
    assert told.credits_at_rest() == {"acme": 1_030}


@pytest.mark.parametrize("side", ["request", "answer"])
def test_a_commit_of_unknown_outcome_is_found_out_by_the_next_owner(told, side):
    """Lost on its way, or done and unanswered: the process ends, what is committed says which."""
    owner = told.owner()
    told.world.commits_to_lose[owner.name] = side
    told.publish("task", 1_000)
    told.until(lambda: owner.ended)

    assert told.credits_at_rest() == {"acme": 1_000}


def test_a_worker_joins_while_the_ledger_is_away_for_ten_minutes(told):
    """Nobody waits for the ledger in a rebalance: it ends in a few seconds and no other one follows; what
    came meanwhile is charged once.
    """
    told.publish("first", 1_000)
    told.until(lambda: told.counted() == (1, 0, 0))
    joining = told.other(told.owner()).name
    told.world.kill(joining, None)
    told.until(lambda: joining not in told.world.group.members)
    told.world.ledger.is_away = True
    told.publish("second", 200)
    told.advance()
    told.world.restart(joining)
    told.until(lambda: len(told.world.group.assigned) == 2, SESSION_S)
    for number in range(10):
        for _ in range(2):
            told.publish(f"meanwhile {number}", 10, partition=number % 2)
        told.world.advance(60)
        assert not told.world.group.is_rebalancing
        assert len(told.world.group.assigned) == 2

    assert told.credits_at_rest() == {"acme": 1_300}


@pytest.mark.parametrize("step", METERING_STEPS)
def test_a_death_at_a_step_before_the_first_record_changes_no_credit(step):
    """Also before the very first commit, when nothing is known of the partition."""
    for seed in SEEDS:
        with scene(seed, waits=False) as told:
            told.world.plans["a", step] = ("kill", 1)
            told.world.plans["b", step] = ("kill", 1)
            told.publish("task", 1_000)
            told.publish("other task", 50, partition=1)
            told.advance(3)

            assert told.credits_at_rest() == {"acme": 1_050}
            assert {name for name, _ in told.world.plans} == set()


@pytest.mark.parametrize("step", METERING_STEPS)
def test_a_death_at_a_step_amid_the_flow_changes_no_credit(step):
    for seed in SEEDS:
        with scene(seed) as told:
            told.world.plans["a", step] = told.world.plans["b", step] = ("kill", 2)
            for number in range(12):
                told.publish(f"task {number}", 1_000, partition=number % 2)
                told.publish(f"task {number}", 1_000, partition=number % 2)
                told.advance(0.3)
                told.world.group.rebalance()

            assert told.credits_at_rest() == {"acme": 12_000}
            assert told.world.plans == {}, "nobody died there"


@pytest.mark.parametrize("step", [Step.ROWS_INSERTED, Step.TRANSACTION_BEGUN])
def test_an_owner_that_sleeps_before_it_begins_is_refused_when_it_wakes(told, step):
    """Another has counted the same records, and more; after compaction, too, its sums stand."""
    assert _wake_too_late(told, step).ended
    assert told.credits_at_rest() == {"acme": 1_111}


def test_an_owner_that_sleeps_between_produce_and_commit_is_refused_when_it_wakes(told):
    """Its records are aborted by the next owner, before that one reads the state."""
    assert _wake_too_late(told, Step.TRANSACTION_PRODUCED).ended
    assert told.credits_at_rest() == {"acme": 1_111}


@pytest.mark.parametrize("step", [Step.FLUSH_BUILT, Step.TRANSACTION_COMMITTED, Step.COMMIT_APPLIED])
def test_an_owner_that_sleeps_elsewhere_is_refused_or_gives_up(told, step):
    """It hears of its loss while it inserts, or tries to commit first: either way nothing of it counts."""
    _wake_too_late(told, step)

    assert told.credits_at_rest() == {"acme": 1_111}


def _wake_too_late(told, step):
    """The owner sleeps at a step; another one takes over and counts on; then it wakes."""
    told.publish("first", 1_000)
    told.until(lambda: told.counted() == (1, 0, 0))
    sleeper = told.owner()
    told.world.plans[sleeper.name, step] = ("stop", 1)
    told.publish("second", 100)
    told.until(lambda: sleeper.is_stopped)
    other = told.other(sleeper)
    told.until(lambda: 0 in other.engine.partitions)
    told.publish("third", 10)
    told.until(lambda: told.counted() == (3, 0, 0))
    told.publish("fourth", 1)
    sleeper.wake()
    told.advance(2)
    told.world.broker.compact("metering-state-changelog", 0, 10**9)
    return sleeper


@pytest.mark.parametrize("seed", SEEDS)
def test_an_owner_that_wakes_amid_a_take_over_commits_before_the_state_is_read_or_never(seed):
    """After any message of the next owner it sends its commit: what it has produced is charged once."""
    messages = 0
    while _wakes_after_message(messages + 1, seed):
        messages += 1

    assert messages >= MESSAGES_OF_A_TAKE_OVER


def _wakes_after_message(number, seed):
    """The owner sleeps between produce and commit until so many messages of the next one are served; whether
    that one had not taken over by then.
    """
    with scene(seed) as told:
        told.publish("first", 1_000)
        told.until(lambda: told.counted() == (1, 0, 0))
        sleeper = told.owner()
        other = told.other(sleeper)
        told.world.plans[sleeper.name, Step.TRANSACTION_PRODUCED] = ("stop", 1)
        told.publish("second", 100)
        told.until(lambda: 0 in other.engine.wanted)
        served = []

        def wake_then(process, _):
            served.append(process is other)
            if sum(served) == number:
                sleeper.wake()

        told.world.on_served = wake_then
        told.until(lambda: sum(served) >= number or 0 in other.engine.partitions)
        is_amid = 0 not in other.engine.partitions

        assert told.credits_at_rest() == {"acme": 1_100}, f"it woke after message {number}"
    return is_amid


def test_a_full_worker_waits_for_the_ledger_and_is_not_busy_meanwhile():
    """One partition's flush cannot end, the other has nothing to flush: nobody wakes it for nothing."""
    with scene(names=("a",)) as told:
        told.world.ledger.is_away = True
        for number in range(3 * LIMITS.pending_max):
            told.publish(f"task {number}", 1_000)
        before = told.world.turns
        told.advance(5)

        assert told.world.turns - before < 5_000
        assert told.credits_at_rest() == {"acme": 36_000}
