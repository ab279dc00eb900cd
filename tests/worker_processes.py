"""Worker processes of a test: started with its settings, asked by their health pages, killed, waited for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from meterline.local.ports import HOST, free_ports

__all__ = ["ALL", "WorkerProcess", "ended_in_the_end", "kept_running", "logs_written_since", "until"]

START_S_MAX = 120.0
"""A worker is ready in 4 s on free cores; a busy machine has taken 40 s."""
STOP_S_MAX = 20.0
POLL_S = 0.05
ALL = [0, 1, 2, 3]
"""The partitions of usage.events and usage.windows."""


_log_files: list[Path] = []
"""Of every worker of this session, the oldest first."""


def until(is_so: Callable[[], object], what: str, seconds: float = START_S_MAX) -> None:
    """Ask until it is so; fail with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(POLL_S)


class WorkerProcess:
    """One slot of a worker, `metering` or `billing`; the process in it may change."""

    def __init__(self, kind: str, environment: Mapping[str, str], log_folder: Path, **changed: str) -> None:
        self.kind = kind
        self.port = free_ports(1)[0]
        self.environment = {**environment, "METERLINE_WORKER__WEB_PORT": str(self.port), **changed}
        self.log_file = log_folder / f"{kind}-{self.port}.log"
        _log_files.append(self.log_file)
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self, *, die_at: str = "", stop_at: str = "", times: int = 1, command: Sequence[str] = ()
    ) -> None:
        """Start it; it kills itself, or falls asleep, when it reaches that step for the n-th time."""
        crash = ["-m", "meterline.local.crash", self.kind, "--at", die_at or stop_at, "--times", str(times)]
        crash += ["--stop"] if stop_at else []
        plain = ["-m", "meterline", "worker", self.kind]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command or [sys.executable, *(crash if die_at or stop_at else plain)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start_ready(self) -> None:
        """Start it and wait until its partitions are restored."""
        self.start()
        until(self.is_ready, f"{self.kind} is ready ({self.log_tail()})")

    def is_ready(self) -> bool:
        """Whether it says so. An ended process never will: that fails at once."""
        assert self.process.poll() is None, f"{self.kind} ended: {self.process.returncode} {self.log_tail()}"
        status, answer = self.get_json("/healthz/ready")
        return status == 200 and answer["partitions"] != []

    def halts(self) -> list[str]:
        """Why partitions halted, when it has looked at all of them."""
        found: list[str] = []

        def looked() -> bool:
            assert self.process.poll() is None, self.log_tail()
            status, answer = self.get_json("/healthz/ready")
            found[:] = answer.get("problems", [])
            return status == 503 and all(problem.startswith("partition ") for problem in found)

        until(looked, "it says what is wrong")
        return sorted(found)

    def partitions(self) -> list[int] | None:
        """Which it says it owns, restored; nothing while it doesn't answer."""
        return self.get_json("/healthz/ready")[1].get("partitions")

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page; 0 while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def get_json(self, path: str) -> tuple[int, dict]:
        """Status and object of a page; 0 and nothing while nobody answers."""
        status, text = self.get(path)
        return status, json.loads(text) if text else {}

    def wait(self, seconds: float = START_S_MAX) -> int:
        """Its exit code; negative: the signal."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.kind} didn't end within {seconds} s: {self.log_tail()}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def terminate(self) -> int:
        """SIGTERM, as an orchestrator does; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(STOP_S_MAX)

    def kill(self) -> None:
        """SIGKILL, if it runs; also wakes a stopped one, to its end."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def log_tail(self) -> str:
        """The last lines of its log, for a failure's text."""
        return tail_of(self.log_file) if self.log_file.exists() else "no log"


def tail_of(log_file: Path) -> str:
    """The last lines of a worker's log."""
    return "\n".join(line[:600] for line in log_file.read_text(errors="replace").splitlines()[-8:])


def logs_written_since(wall_s: float) -> str:
    """Names and last lines of the logs of all workers that said something since then; empty if none did."""
    written = [file for file in _log_files if file.exists() and file.stat().st_mtime >= wall_s]
    return "\n".join(f"{file}\n{tail_of(file)}\n" for file in written)


@contextmanager
def kept_running(*workers: WorkerProcess) -> Iterator[Counter[int]]:
    """Start again whichever ends meanwhile, as an orchestrator does; counts their exit codes.

    On a busy machine one that stalls beyond its session is fenced, and ends to be started again.
    """
    stop, ended = threading.Event(), Counter[int]()

    def watch() -> None:
        while not stop.wait(POLL_S):
            for worker in workers:
                if (code := worker.process.poll()) is not None:
                    ended[code] += 1
                    worker.start()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield ended
    finally:
        stop.set()
        watcher.join()


@contextmanager
def ended_in_the_end(*workers: WorkerProcess):
    """Whatever happens: none of them is left."""
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
