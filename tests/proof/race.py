"""Processes racing for one client's credits, killed, stalled and started again; and the verdict on it."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from tests.proof.attempts import KILLS, RacerPlan
from tests.proof.pipeline import Pipeline, wait_for
from tests.proof.quota_checker import Verdict, judge
from tests.proof.quota_evidence import Observer, gather, read_bucket
from tests.proof.task_log import read_lines
from tests.proof.tasks import MICRO

from meterline.quota import CreditBuckets, CreditsExhausted

__all__ = ["Race", "Racers", "Rules", "run_race"]

TURN_S = 0.05
RACING_BYTES = 3_000
BETWEEN_KILLS_S = (0.5, 4.0)
AWAY_SHARE_MAX = 0.6
"""Of a reservation's time: a killed process that comes back later may find it ended, however punctual
its tasks are. Then the bound must hold with its terms, instead of without them."""
RACE_S_MAX = 900.0
QUIET_EXTRA_S = 40.0
"""After the longest hold has ended: totals and progress come each second, the sweep too."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How a race is run.

    Attributes:
        granted: micro-credits.
        kills: steps after which processes kill themselves; each process does it at `kills_each` of them.
        outside: how often a process is killed from outside, wherever it is.
        stalls: how often a process is stopped for `stall_s`.
    """

    name: str
    processes: int = 8
    tasks: int = 400
    granted: int = 1_000_000 * MICRO
    ttl_s: float = 20.0
    concurrency: int = 12
    pause_s: float = 0.04
    late: bool = False
    lease_ttl_s: float = 0.0
    lease_share: float = 0.01
    kills: tuple[str, ...] = KILLS
    kills_each: int = len(KILLS)
    kill_within: int = 12
    outside: int = 8
    stalls: int = 0
    stall_s: float = 0.0

    def scaled(self, processes: int, tasks: int) -> Rules:
        """Fewer tasks, for as many credits each."""
        granted = self.granted * processes * tasks // (self.processes * self.tasks)
        return replace(self, processes=processes, tasks=tasks, granted=granted)


@dataclass(slots=True)
class _Slot:
    number: int
    log: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    is_finished: bool = False
    size_at_start: int = 0
    wakes_at: float = 0.0

    @property
    def size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    @property
    def is_racing(self) -> bool:
        """Whether it runs and has done something since it was started: killing an interpreter that starts up
        proves nothing.
        """
        return (
            not self.is_finished
            and not self.wakes_at
            and self.process.poll() is None
            and self.size > self.size_at_start + RACING_BYTES
        )


class Racers:
    """The racing processes: started again when they were killed, until each has finished."""

    def __init__(self, pipeline: Pipeline, rules: Rules, client_id: str) -> None:
        self.folder = pipeline.folder / client_id
        self.folder.mkdir()
        self.kills: Counter[str] = Counter()
        self.stalled = 0
        self._rules, self._environment = rules, pipeline.environment
        self._chance = random.Random(client_id)
        self._slots = []
        for number in range(rules.processes):
            first = number * rules.kills_each
            kills = [rules.kills[(first + n) % len(rules.kills)] for n in range(rules.kills_each)]
            self._chance.shuffle(kills)
            plan = RacerPlan(
                seed=client_id,
                slot=number,
                tasks=rules.tasks,
                client_id=client_id,
                topic_id=pipeline.topic_id,
                log=str(self.folder / f"racer-{number}.log"),
                ttl_s=rules.ttl_s,
                concurrency=rules.concurrency,
                pause_s=rules.pause_s,
                late=rules.late,
                lease_ttl_s=rules.lease_ttl_s,
                lease_share=rules.lease_share,
                kills=tuple(kills),
                kill_within=rules.kill_within,
            )
            file = self.folder / f"racer-{number}.json"
            plan.save(file)
            command = [sys.executable, "-m", "tests.proof.racer", str(file)]
            self._slots.append(_Slot(number, Path(plan.log), command))
        self._next_kill = self._next_stall = time.monotonic()

    @property
    def logs(self) -> list[Path]:
        return [slot.log for slot in self._slots]

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
        """Until all have finished; `meanwhile` is called every turn. What went wrong."""
        deadline = time.monotonic() + RACE_S_MAX
        try:
            while not all(slot.is_finished for slot in self._slots):
                for slot in self._slots:
                    if problem := self._look_after(slot):
                        return [problem]
                self._disturb()
                meanwhile()
                if time.monotonic() > deadline:
                    return [f"not finished after {RACE_S_MAX:.0f} s"]
                time.sleep(TURN_S)
        finally:
            for slot in self._slots:
                if slot.process is not None and slot.process.poll() is None:
                    slot.process.kill()
                    slot.process.wait()
        return []

    def _look_after(self, slot: _Slot) -> str:
        if slot.is_finished:
            return ""
        code = None if slot.process is None else slot.process.poll()
        if slot.process is not None and code is None:
            return ""
        if code not in (None, 0, -signal.SIGKILL):
            tail = (self.folder / f"racer-{slot.number}.out").read_text(errors="replace")[-2_000:]
            return f"racer {slot.number} ended with {code}: {tail}"
        slot.is_finished = code == 0
        if not slot.is_finished:
            slot.size_at_start = slot.size
            with (self.folder / f"racer-{slot.number}.out").open("ab") as out:
                slot.process = subprocess.Popen(
                    slot.command, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
        return ""

    def _disturb(self) -> None:
        """Kill one from outside, stop one, wake up one."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.wakes_at and now >= slot.wakes_at:
                slot.wakes_at = 0.0
                slot.process.send_signal(signal.SIGCONT)
        running = [slot for slot in self._slots if slot.is_racing]
        if not running:
            return
        if self.kills["outside"] < self._rules.outside and now >= self._next_kill:
            self._next_kill = now + self._chance.uniform(*BETWEEN_KILLS_S)
            self._chance.choice(running).process.kill()
            self.kills["outside"] += 1
        elif self.stalled < self._rules.stalls and now >= self._next_stall:
            self._next_stall = now + self._chance.uniform(0.5, 1.0) * self._rules.stall_s
            slot = self._chance.choice(running)
            slot.process.send_signal(signal.SIGSTOP)
            slot.wakes_at = now + self._rules.stall_s
            self.stalled += 1


@dataclass(slots=True)
class Race:
    """One race and what came of it."""

    pipeline: Pipeline
    rules: Rules
    client_id: str = ""
    verdict: Verdict | None = None
    kills: Counter[str] = field(default_factory=Counter)
    stalled: int = 0
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


def run_race(
    pipeline: Pipeline,
    rules: Rules,
    *,
    meanwhile: Callable[[Race, Observer], None] = lambda _race, _observer: None,
    plant: Callable[[Race], None] | None = None,
) -> Race:
    """Grant, race, wait until nothing moves, judge.

    Args:
        meanwhile: called all the time during the race.
        plant: called once, when a third of the credits is used: does something wrong.
    """
    race = Race(pipeline, rules, client_id=f"{rules.name}-{uuid.uuid4().hex[:8]}")
    pipeline.grant(race.client_id, rules.granted)
    began = time.monotonic()
    racers = Racers(pipeline, rules, race.client_id)
    with Observer(pipeline.places, race.client_id) as observer:
        planted = plant is None

        def turn() -> None:
            nonlocal planted
            meanwhile(race, observer)
            if not planted and observer.samples and observer.samples[-1].available < rules.granted * 2 // 3:
                planted = True
                plant(race)

        problems = racers.run(turn)
        race.seconds = time.monotonic() - began
        if not problems:
            wait_for(lambda: _is_quiet(race), rules.ttl_s + QUIET_EXTRA_S)
        evidence = gather(pipeline.places, race.client_id, racers.logs, observer)
    race.notes["longest_away_s"] = away = _longest_away_s(racers.logs)
    is_slow = away > AWAY_SHARE_MAX * rules.ttl_s
    if is_slow:
        race.notes["machine_too_slow"] = "for every term to be 0"
    evidence = replace(evidence, stalls=racers.stalled)
    race.verdict = judge(evidence, terms_expected=rules.late or rules.stalls > 0 or is_slow)
    race.kills = evidence.tasks.kills + racers.kills
    race.stalled = racers.stalled
    race.notes["generations"] = len(observer.generations)
    race.notes["leases"] = len(observer.lease_holds)
    race.notes["lapsed_leases"] = len(evidence.bucket.lapsed_leases)
    race.notes["lowest_available"] = min((s.available for s in observer.samples), default=0)
    race.verdict.problems += problems
    race.verdict.problems += [] if plant else _unusable(race, evidence.bucket.available)
    race.verdict.problems += _untested(race, evidence.tasks.ends)
    return race


def _longest_away_s(logs: Iterable[Path]) -> float:
    """From a kill until the process was there again: its work is late if its reservations end meanwhile."""
    longest = 0
    for path in logs:
        lines = list(read_lines(path))
        for before, line in itertools.pairwise(lines):
            if line["do"] == "start":
                longest = max(longest, line["at"] - before["at"])
    return longest / 1_000


def _is_quiet(race: Race) -> bool:
    """Nothing is provisional or reserved in an open bucket. Whether the sums are right, the checker says."""
    if race.pipeline.granted(race.client_id) < 0:
        return False  # it is being rebuilt: what it says is not yet what it will say
    with race.pipeline.redis() as redis:
        bucket = read_bucket(redis, race.pipeline.places.namespace, race.client_id)
    return bucket.provisional == 0 and bucket.reserved == 0


def _unusable(race: Race, available: int) -> list[str]:
    """Whether all that is left can be reserved, and not a millionth more."""

    async def ask() -> list[str]:
        settings = race.pipeline.stack.settings.redis
        connection = CreditBuckets.connect(settings.url, namespace=settings.namespace, timeout_ms=5_000)
        problems = []
        async with connection as buckets:
            try:
                await buckets.reserve(
                    race.client_id, Decimal(available + 1).scaleb(-6), reservation_id="one-more"
                )
                problems.append("more can be reserved than is left")
            except CreditsExhausted:
                pass
            if available > 0:
                try:
                    await buckets.reserve(
                        race.client_id, Decimal(available).scaleb(-6), reservation_id="the-rest"
                    )
                    await buckets.void("the-rest")
                except CreditsExhausted as error:
                    problems.append(f"stranded: {error}")
        return problems

    return asyncio.run(ask()) if available >= 0 else []


def _untested(race: Race, ends: Mapping[str, int]) -> list[str]:
    """A race that never met what it is about proves nothing."""
    wanted = [*race.rules.kills, *(["outside"] if race.rules.outside else [])]
    problems = [f"no process was killed: {kind}" for kind in wanted if not race.kills[kind]]
    problems += [
        f"no reservation was {how}" for how in ("refused", "voided", "left", "settled") if not ends[how]
    ]
    if race.stalled < race.rules.stalls:
        problems.append(f"{race.stalled} of {race.rules.stalls} stalls")
    return problems
