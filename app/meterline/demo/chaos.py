"""Kills in the middle of the work: which worker, at which moment, and how it is told."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from meterline.demo.workers import Worker, WorkerFailed, wait_until

__all__ = ["Kill", "kills"]

DEATH_TIMEOUT_S = 30.0
COMMITS_BEFORE = 6
"""Each of a worker's partitions may commit once at its start; more than that is work."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL. With a step the worker dies exactly there, otherwise wherever it happens to be.

    Attributes:
        times: how often it comes to the step; more than it has partitions, so that one has committed before.
    """

    worker: str
    step: str = ""
    times: int = 1

    def aim(self, workers: Mapping[str, Worker]) -> None:
        """Before the work: a worker that will die at a step is started anew, with that in mind."""
        victim = workers[self.worker]
        if self.step:
            victim.stop()
            victim.start(die_at=self.step, times=self.times)
        wait_until(victim, "ready")

    def strike(self, workers: Mapping[str, Worker]) -> str:
        """While the work is done: see it die, start it again, and say so."""
        victim = workers[self.worker]
        if self.step:
            deadline = time.monotonic() + DEATH_TIMEOUT_S
            while victim.is_running:
                if time.monotonic() > deadline:
                    raise WorkerFailed(f"{victim.name} didn't reach {self.step}")
                time.sleep(0.02)
            moment = f"at {self.step} (arrival {self.times})"
        else:
            wait_until(victim, "working", commits=COMMITS_BEFORE)
            moment = f"after {victim.commits} commits"
            victim.kill()
        victim.start()
        wait_until(victim, "ready")
        return f"kill -9 {victim.name} {moment}; it is back"


def kills() -> list[Kill]:
    """Five, over both kinds of workers; the first and the fourth hit the moments that hurt most."""
    return [
        Kill("metering-1", "rows.inserted", 3),
        Kill("billing-1"),
        Kill("metering-2"),
        Kill("metering-2", "transaction.produced", 3),
        Kill("billing-1", "attempt.in_ledger", 6),
    ]
