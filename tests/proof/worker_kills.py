"""Two workers that are killed all the time: at every step the code names, and anywhere in between.

Each slot's worker is started with its next death in mind, dies, and is started again, as orchestrators do.
Beside them services may be killed, and are started again.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType

from tests.proof.pipeline import wait_for
from tests.stacks import RunningStack
from tests.worker_processes import ALL, WorkerProcess

from meterline import streaming
from meterline.streaming.steps import Step

__all__ = ["ANYWHERE", "TAKE_OVER", "Campaign", "Kill", "plan_kills", "steps_of"]

ANYWHERE, TAKE_OVER = "anywhere", "take-over"
"""Not at a step: wherever it is after some commits; the second stays away until the other one owns all."""
ANYWHERE_SHARE, TAKE_OVER_SHARE = 0.2, 0.05
AT_START = {Step.OWNER_FENCED, Step.STATE_READ, Step.STATE_RESTORED}
"""Reached once for each partition, at the start; the others again and again."""
AT_START_TIMES, LATER_TIMES = (1, 2), (6, 40)
"""At which arrival it dies. Later ones: of each of its partitions a flush has been committed before."""
COMMITS_BEFORE = 6
DELAY_S = (0.0, 1.5)
DEATH_S_MAX = 120.0
"""A start on a busy machine, an outage of Kafka and of ClickHouse in a row."""
TAKEN_OVER_S_MAX = 60.0
SECONDS_OF_A_KILL = 3.0
"""Before the first one tells: start, restore and some commits take so long on two slots."""
OUTAGE_S = 1.5
LOOK_S = 0.05
SAID_EACH = 10
COMMITS = re.compile(r"^meterline_commits_total (\S+)", re.MULTILINE)
CALL = re.compile(r"\breached\(Step\.(\w+)\)")


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL.

    Attributes:
        at: a step's name, ANYWHERE or TAKE_OVER.
        times: at which arrival there.
        delay_s: after the commits, where it isn't at a step.
    """

    at: str
    times: int = 0
    delay_s: float = 0.0


def steps_of(package: ModuleType) -> list[Step]:
    """Every step a worker of `metering` or `billing` can come to: found in the code that announces them."""
    folders = [Path(part.__path__[0]) for part in (package, streaming)]
    announced = {
        name for folder in folders for file in folder.rglob("*.py") for name in CALL.findall(file.read_text())
    }
    return [step for step in Step if step.name in announced]


def plan_kills(
    kills: int, seed: int, steps: Sequence[Step], later_times: tuple[int, int] = LATER_TIMES
) -> list[Kill]:
    """So many, in random order: every step as often as the others.

    Args:
        later_times: between how many arrivals at a step that is reached again and again.
    """
    chance = random.Random(seed)
    take_overs = max(1, round(kills * TAKE_OVER_SHARE))
    anywhere = max(1, round(kills * ANYWHERE_SHARE))
    at_steps = kills - take_overs - anywhere
    assert at_steps >= len(steps), f"{kills} kills: nobody would die at some of {len(steps)} steps"
    plan = [
        Kill(step, chance.randint(*(AT_START_TIMES if step in AT_START else later_times)))
        for step in islice(cycle(steps), at_steps)
    ]
    plan += [Kill(ANYWHERE, delay_s=chance.uniform(*DELAY_S)) for _ in range(anywhere)]
    plan += [Kill(TAKE_OVER, delay_s=chance.uniform(*DELAY_S)) for _ in range(take_overs)]
    chance.shuffle(plan)
    return plan


@dataclass(slots=True)
class Campaign:
    """All the kills of a run.

    Attributes:
        killed: SIGKILLs by where the worker was.
        outages: SIGKILLs of services.
        ended: exit codes of workers that ended by themselves, e.g. fenced, or because a service was away.
    """

    stack: RunningStack
    workers: Sequence[WorkerProcess]
    plan: Sequence[Kill]
    outages_planned: Sequence[str]
    deadline: float
    say: Callable[[str], object]
    killed: Counter[str] = field(default_factory=Counter)
    outages: Counter[str] = field(default_factory=Counter)
    ended: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    _left: list[Kill] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def seconds_left(self) -> float:
        """How long the rest takes if it goes on as it went; nothing when all are done."""
        done = self.killed.total()
        if self._over.is_set():
            return 0.0
        return (len(self.plan) - done) * (
            (time.monotonic() - self.began) / done if done else SECONDS_OF_A_KILL
        )

    def run(self) -> None:
        """All of the plan, or what the time allows. In the end the workers run."""
        self._left = list(reversed(self.plan))
        self.began = time.monotonic()
        try:
            with ThreadPoolExecutor(len(self.workers) + 1) as threads:
                services = threads.submit(self._kill_services)
                slots = [threads.submit(self._live, slot) for slot in range(len(self.workers))]
                try:
                    for slot in slots:
                        slot.result()
                except BaseException:  # Ctrl-C, too: what runs is broken off
                    self.break_off()
                    raise
                self._over.set()
                services.result()
        finally:
            self._over.set()
            self.seconds = time.monotonic() - self.began
        if missing := [kill.at for kill in self.plan if not self.killed[kill.at]]:
            self.problems.append(f"nobody was killed at {', '.join(sorted(set(missing)))}")
        if self._left:
            self.problems.append(f"{len(self._left)} of {len(self.plan)} kills were not done in the time")
        missed = Counter(self.outages_planned) - self.outages
        if missed:
            self.problems.append(f"services not killed: {dict(missed)}")

    def break_off(self) -> None:
        """The proof ends: no slot waits for a death that won't come any more."""
        self.deadline = 0.0
        self._over.set()
        for worker in self.workers:
            worker.kill()

    # -- one slot

    def _live(self, slot: int) -> None:
        """Die and be started again until there is nothing left to die of."""
        worker, other = self.workers[slot], self.workers[1 - slot]
        while (kill := self._next()) is not None:
            while (code := self._die(worker, kill)) != -signal.SIGKILL:
                self.ended[code] += 1
                if time.monotonic() > self.deadline:
                    self._left.append(kill)
                    return worker.start()
            with self._lock:
                self.killed[kill.at] += 1
                if not (done := self.killed.total()) % SAID_EACH:
                    self.say(f"{done} of {len(self.plan)} kills, {time.monotonic() - self.began:.0f} s")
            if kill.at == TAKE_OVER:
                wait_for(lambda: other.partitions() == ALL, TAKEN_OVER_S_MAX)
        worker.start()
        return None

    def _next(self) -> Kill | None:
        with self._lock:
            return self._left.pop() if self._left and time.monotonic() < self.deadline else None

    def _die(self, worker: WorkerProcess, kill: Kill) -> int:
        """One life; how it ended."""
        if kill.at not in {ANYWHERE, TAKE_OVER}:
            worker.start(die_at=kill.at, times=kill.times)
            return worker.wait(DEATH_S_MAX)
        worker.start()
        ended_or_working = lambda: worker.process.poll() is not None or commits(worker) >= COMMITS_BEFORE  # noqa: E731 - one line
        if not wait_for(ended_or_working, DEATH_S_MAX):
            raise AssertionError(f"{worker.kind} commits nothing: {worker.log_tail()}")
        time.sleep(kill.delay_s)
        worker.kill()
        return worker.process.returncode

    # -- services

    def _kill_services(self) -> None:
        """Spread over the kills of workers: each when its share of them is done."""
        for number, name in enumerate(self.outages_planned, start=1):
            share = number / (len(self.outages_planned) + 1)
            while self.killed.total() < share * len(self.plan):
                if self._over.wait(LOOK_S):
                    return
            (pid,) = [service.pid for service in self.stack.local.status() if service.name == name]
            os.kill(pid, signal.SIGKILL)
            self._over.wait(OUTAGE_S)
            self.stack.local.up()
            self.outages[name] += 1


def commits(worker: WorkerProcess) -> int:
    """Transactions of this process so far; 0 while it doesn't answer."""
    found = COMMITS.search(worker.get("/metrics")[1])
    return int(float(found[1])) if found else 0
