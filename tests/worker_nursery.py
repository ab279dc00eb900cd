"""Worker processes that are forked from one that has imported everything: hundreds can die within minutes.

A worker spends 3 s of CPU time on imports and compiled kernels before it does anything. Tests that kill it
again and again would do little else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.worker_processes import WorkerProcess

__all__ = ["NurseryWorker"]

NURSERY = multiprocessing.get_context("forkserver")
NURSERY.set_forkserver_preload(["tests.worker_preloaded"])


class NurseryWorker(WorkerProcess):
    """A slot whose processes are forked: real ones, with everything of their own but the time to start.

    Attributes:
        create: makes the app of the settings, where it isn't the product's own; can be pickled.
    """

    create: Callable[[Any], Any] | None = None

    def start(
        self, *, die_at: str = "", stop_at: str = "", times: int = 1, command: Sequence[str] = ()
    ) -> None:
        """Start it; it kills itself, or falls asleep, when it reaches that step for the n-th time."""
        assert not command, "a forked worker is the product's own"
        step = die_at or stop_at
        crash = [self.kind, "--at", step, "--times", str(times), *(["--stop"] if stop_at else [])]
        arguments = (
            self.kind,
            dict(self.environment),
            str(self.log_file),
            crash if step else [],
            self.create,
        )
        born = NURSERY.Process(target=_live, args=arguments)
        born.start()
        self.process = _Forked(born)


class _Forked:
    """What tests ask of a process, answered as `subprocess.Popen` does."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _live(
    kind: str,
    environment: Mapping[str, str],
    log_file: str,
    crash: Sequence[str],
    create: Callable[[Any], Any] | None,
) -> None:
    """The whole life of a forked worker."""
    os.environ.clear()
    os.environ.update(environment)
    with Path(log_file).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from tests import worker_preloaded as worker  # noqa: PLC0415 - the parent needs nothing of it

    if create is not None:
        worker.WORKERS[kind] = create
    if crash:
        sys.argv = ["crash", *crash]
        worker.main()
    else:
        worker.run_worker(worker.WORKERS[kind](worker.load_settings()))
