"""Worker processes of the demo: started, watched through their own health pages, killed, started again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from meterline.errors import MeterlineError
from meterline.local.ports import HOST

__all__ = ["Worker", "WorkerFailed", "replayed_offsets", "stop_all", "wait_until"]

START_TIMEOUT_S = 60.0
"""A worker is ready in 4 s on free cores; a busy machine takes several times that."""
STOP_TIMEOUT_S = 20.0
POLL_S = 0.1
ANSWER_TIMEOUT_S = 2.0
LOG_TAIL_LINES = 5
COMMITS = re.compile(r"^meterline_commits_total (\S+)", re.MULTILINE)


class WorkerFailed(MeterlineError):  # noqa: N818 - named for what happened
    """A worker ended by itself, or didn't get ready."""


class Worker:
    """One slot of a worker: the process in it may change."""

    def __init__(
        self, kind: str, slot: int, port: int, environment: Mapping[str, str], log_folder: Path
    ) -> None:
        self.name = f"{kind}-{slot}"
        self.log_file = log_folder / f"{self.name}.log"
        self._kind = kind
        self._port = port
        self._environment = {
            **environment,
            "METERLINE_WORKER__WEB_PORT": str(port),
            # The same member after a restart: its partitions wait for it instead of for a time-out.
            "METERLINE_WORKER__INSTANCE_ID": self.name,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, die_at: str = "", times: int = 1) -> None:
        """Start it; with `die_at` it kills itself when it reaches that step for the n-th time."""
        command = [sys.executable, "-m", "meterline", "worker", self._kind]
        if die_at:
            crash = [sys.executable, "-m", "meterline.local.crash", self._kind]
            command = [*crash, "--at", die_at, "--times", str(times)]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to handle: workers are stopped in order
            )

    def kill(self) -> None:
        """SIGKILL: no goodbye to anybody."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that isn't heard."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether its partitions are restored.

        Raises:
            WorkerFailed: it ended.
        """
        self.require_running()
        return self._get("/healthz/ready") is not None

    @property
    def commits(self) -> int:
        """Transactions of this process so far; 0 while it doesn't answer."""
        found = COMMITS.search(self._get("/metrics") or "")
        return int(float(found[1])) if found else 0

    def require_running(self) -> None:
        """Raise when it ended by itself."""
        if not self.is_running:
            raise WorkerFailed(f"{self.name} ended. Its log ({self.log_file}) says:\n{self._log_tail()}")

    def _get(self, path: str) -> str | None:
        try:
            with urllib.request.urlopen(
                f"http://{HOST}:{self._port}{path}", timeout=ANSWER_TIMEOUT_S
            ) as answer:
                return str(answer.read().decode())
        except OSError:  # an answer of 4xx or 5xx is one too
            return None

    def _log_tail(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join(f"  {line[:400]}" for line in lines)


def wait_until(worker: Worker, what: str, *, commits: int = 0) -> None:
    """Wait for a worker to be ready and to have committed so often.

    Raises:
        WorkerFailed: it ended, or took too long.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (worker.is_ready and worker.commits >= commits):
        if time.monotonic() > deadline:
            raise WorkerFailed(
                f"{worker.name} is not {what} after {START_TIMEOUT_S:.0f} s: {worker.log_file}"
            )
        time.sleep(POLL_S)


def stop_all(workers: Sequence[Worker]) -> None:
    """Stop them all, whatever happens to one."""
    for worker in workers:
        worker.stop()


def replayed_offsets(workers: Iterable[Worker]) -> int:
    """Offsets read again after a crash although their rows were in the ledger, by the workers' own logs."""
    total = 0
    for worker in workers:
        for line in worker.log_file.read_text(errors="replace").splitlines():
            if "rows of an uncommitted flush found" in line:
                told = json.loads(line[line.index("{") :])
                total += told["last_offset"] - told["first_offset"] + 1
    return total
