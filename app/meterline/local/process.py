"""Background processes that outlive us: started in their own session, found again by a pid file.

A pid alone proves nothing, because pids are used again. So the file also keeps when the process was started,
and a process with another start is never touched.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ProcessRecord", "forget", "is_alive", "read_record", "start_process", "stop_process"]

STOP_TIMEOUT_S = 15.0
"""From SIGTERM to SIGKILL: Kafka writes its recovery point and a class archive, a few seconds at most."""

KILL_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A started process. `started`: the operating system's word for when, unique with the pid."""

    pid: int
    started: str


def start_process(command: Sequence[str], *, record_file: Path, log_file: Path) -> ProcessRecord:
    """Start in the background, away from our terminal's Ctrl-C, output appended to the log."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    record_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own command lines
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.returncode = 0  # it outlives this object: no warning when that is collected
    record = ProcessRecord(process.pid, _started(process.pid) or "")
    partial = record_file.with_suffix(".new")
    partial.write_text(json.dumps(asdict(record)))
    partial.replace(record_file)
    return record


def read_record(record_file: Path) -> ProcessRecord | None:
    """The process a file names, if it still runs; a stale or torn file is nothing."""
    try:
        record = ProcessRecord(**json.loads(record_file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if is_alive(record) else None


def forget(record_file: Path) -> None:
    """Remove the pid file of a process that is gone."""
    record_file.unlink(missing_ok=True)


def is_alive(record: ProcessRecord) -> bool:
    """Whether this very process runs, not another one with its pid."""
    alive = bool(record.started) and _started(record.pid) == record.started
    if not alive:  # reaped after it was seen: one that ends in between must not stay behind as a zombie
        _reap(record.pid)
    return alive


def stop_process(record: ProcessRecord) -> bool:
    """SIGTERM, then SIGKILL after a limit; whether SIGTERM was enough."""
    for number, timeout_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
        if not is_alive(record):
            return True
        os.kill(record.pid, number)
        deadline = time.monotonic() + timeout_s
        while is_alive(record) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
    return False


def _reap(pid: int) -> None:
    """Let a finished child of ours disappear; other processes are somebody else's children."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def _started(pid: int) -> str | None:
    """When a process was started, nothing if it doesn't run (any more)."""
    if sys.platform == "linux":
        try:
            # The name, in brackets, may hold spaces: state is the first field after it, start the 20th.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # A killed process whose first thread is gone holds its ports until its last thread is gone too:
        # num_threads is the 18th of these fields.
        gone = fields[0] in "ZX" and int(fields[17]) <= 1
        return None if gone else f"{boot}:{fields[19]}"
    listed = subprocess.run(  # noqa: S603 - a fixed command
        ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return None if not listed or listed[0].startswith("Z") else listed[1].strip()
