"""A rolling upgrade: workers of two versions, or with two settings, at once. The credits are the same."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from tests.simulation.histories import METERING_STEPS
from tests.simulation.scenes import scene
from tests.simulation.two_versions import REFUSED, UNLUCKY_MICRO, Program
from tests.simulation.world import LENGTH_MS, SETTINGS, START_MS

from meterline.metering.state import FORMAT_VERSION, RULE_VERSION, Meta
from meterline.streaming.steps import Step

SEEDS = range(2)
OLDER, NEWER = Program(), Program(newer_format=True)
NEWER_RULES = Program(newer_rules=True)
TOO_NEW = "Run the newer version here, too"


@pytest.fixture(autouse=True)
def judge_reads_every_version(monkeypatch):
    """The books look at META of all of them."""
    read = Meta.from_bytes

    def from_bytes(data):
        with NEWER.runs(), NEWER_RULES.runs() if b'"rules":2' in data else NEWER.runs():
            return read(data)

    monkeypatch.setattr("tests.simulation.books.Meta", type("Read", (), {"from_bytes": from_bytes}))


def start_again(told, name, program=None, settings=None):
    """The process ends and begins again at once, with another program or other settings."""
    if program is not None:
        told.world.program_of[name] = program
    if settings is not None:
        told.world.settings_of[name] = settings
    told.world.kill(name, None)
    told.world.restart(name)
    told.until(lambda: sum(len(w.engine.partitions) for w in told.world.workers.values()) == 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_older_version_halts_at_a_newer_state_and_writes_nothing(seed):
    """Half upgraded: what the newer one has counted the older one leaves alone, and says what to do."""
    with scene(seed) as told:
        told.world.program_of = {"a": OLDER, "b": OLDER}
        for partition in (0, 1):
            told.publish("first", 1_000, partition=partition)
        told.advance()
        start_again(told, "a", OLDER)
        start_again(told, "b", NEWER)
        (migrated,) = told.world.workers["b"].engine.partitions
        told.publish("second", 200, partition=migrated)
        told.until(lambda: told.books.meta(migrated).format == FORMAT_VERSION + 1)
        told.world.kill("b", None)
        told.books.expected_halt = TOO_NEW
        a = told.world.workers["a"]
        told.until(lambda: a.engine.halted)
        before = dict(told.books._state[migrated])
        for partition in (0, 1):
            told.publish("third", 30, partition=partition)
        told.until(lambda: told.counted(1 - migrated) == (2, 0, 0))
        told.advance(2)

        assert list(a.engine.halted) == [migrated]
        assert f"format {FORMAT_VERSION + 1}" in a.engine.halted[migrated]
        assert before == told.books._state[migrated], "the older version wrote to a state it can't read"
        told.world.program_of["a"] = NEWER
        told.world.kill("a")
        told.advance(2)
        told.books.expected_halt = None
        assert told.credits_at_rest() == {"acme": 2_260}


@pytest.mark.parametrize("step", METERING_STEPS)
def test_a_death_amid_the_migration_leaves_a_state_one_of_them_reads(step):
    """Migrated or not, never half: whoever can read what is committed goes on with it."""
    with scene(names=("a",)) as told:
        told.publish("first", 1_000)
        told.until(lambda: told.counted() == (1, 0, 0))
        told.world.program_of["a"] = NEWER
        told.world.plans["a", step] = ("kill", 1)
        told.world.kill("a")
        told.publish("second", 200)
        told.until(lambda: told.world.plans == {})
        told.world.program_of["a"] = OLDER
        told.books.expected_halt = TOO_NEW
        told.advance(3)
        is_migrated = told.books.meta(0).format > FORMAT_VERSION

        assert is_migrated == bool(told.world.workers["a"].engine.halted)
        if is_migrated:
            told.world.program_of["a"] = NEWER
            told.world.kill("a")
        assert told.credits_at_rest() == {"acme": 1_200}


@pytest.mark.parametrize("seed", SEEDS)
def test_new_rules_hold_behind_what_an_older_version_has_begun(seed):
    """Its rows are in the ledger, uncommitted: they are decided once more as it did, or ledger and windows
    would differ. What comes later is decided by the new rules.
    """
    with scene(seed, names=("a",)) as told:
        told.publish("first", 1_000)
        told.until(lambda: told.counted() == (1, 0, 0))
        told.world.plans["a", Step.ROWS_INSERTED] = ("kill", 1)
        told.world.program_of["a"] = NEWER_RULES
        begun = told.publish("second", UNLUCKY_MICRO)
        told.until(lambda: told.world.plans == {})
        told.traffic.models[0].also_refused = lambda published: (
            REFUSED
            if published.offset > begun.offset and published.usage.credits_micro == UNLUCKY_MICRO
            else None
        )
        told.until(lambda: told.counted() == (2, 0, 0))
        assert told.books.meta(0).rules == RULE_VERSION + 1
        told.publish("third", UNLUCKY_MICRO)
        told.publish("fourth", 200)
        told.until(lambda: told.counted() == (3, 0, 1))
        told.world.program_of["a"] = OLDER
        told.books.expected_halt = TOO_NEW
        told.world.kill("a")
        told.until(lambda: told.world.workers["a"].engine.halted)
        told.world.program_of["a"] = NEWER_RULES
        told.world.kill("a")

        assert told.credits_at_rest() == {"acme": 1_000 + UNLUCKY_MICRO + 200}


# -- windows of another length

HOURLY = SETTINGS.model_copy(update={"keep_closed_windows_ms": 2_000})
SINCE_MS = START_MS + 20_000
LONGER = HOURLY.model_copy(
    update={
        "window_length_ms": 2 * LENGTH_MS,
        "window_length_since": datetime.fromtimestamp(SINCE_MS / 1000, UTC),
    }
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "step", [None, Step.ROWS_INSERTED, Step.TRANSACTION_PRODUCED, Step.TRANSACTION_COMMITTED]
)
def test_windows_of_another_length_begin_at_one_edge_whoever_owns_the_partition(seed, step):
    """One worker has the new setting, the other one not yet: partitions go back and forth, one dies amid the
    change, events come late from before it; each credit is in one window, and no window overlaps another.
    """
    with scene(seed, HOURLY) as told:
        told.publish("first", 1_000)
        told.until(lambda: told.counted() == (1, 0, 0))
        if step is not None:
            told.world.plans["b", step] = ("kill", 1)
        start_again(told, "b", settings=LONGER)
        told.until(lambda: _moved_until_changed(told))
        (_, change) = told.books.meta(0).lengths.changes
        assert change.starts % (2 * LENGTH_MS) == 0
        assert change.starts >= SINCE_MS
        assert change.starts > max(p.usage.occurred_at for p in told.traffic.models[0].published)
        told.publish("before", 20)
        told.world.jump(change.starts - told.world.wall_ms() - 500)
        for number in range(8):
            told.publish(f"around {number}", 100)
            told.publish(f"ahead {number}", 7, ago_ms=-1_700)
            told.publish(f"late {number}", 3, ago_ms=(number + 1) * 900)
            told.advance(0.3)
            told.world.group.rebalance()
        told.publish("around 0", 100)
        told.world.settings_of["a"] = LONGER

        assert told.credits_at_rest() == {"acme": 1_020 + 8 * 110}
        assert len(told.books.meta(0).lengths.changes) == 2, "one change, whoever took over"
        starts = sorted(start for partition, start, _ in told.books.snapshots if partition == 0)
        assert any(start >= change.starts for start in starts)
        assert all(start % (2 * LENGTH_MS) == 0 for start in starts if start >= change.starts)


def _moved_until_changed(told):
    """Whether the worker with the new setting has had the partition."""
    meta = told.books.meta(0)
    if len(meta.lengths.changes) > 1:
        return True
    told.publish(f"meanwhile {told.world.now}", 0)
    told.world.group.rebalance()
    told.world.advance(0.5)
    return False
