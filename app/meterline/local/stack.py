"""The local stack: its services started together, found again, and stopped without a trace."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from meterline.errors import UserError
from meterline.local.kafka import Kafka
from meterline.local.ports import HOST, Ports, is_free, port_variable
from meterline.local.process import ProcessRecord, forget, is_alive, read_record, start_process, stop_process
from meterline.local.python_services import ClickHouse, StripeSandbox
from meterline.local.redis import Redis
from meterline.local.service import Progress, Service

__all__ = ["ServiceStatus", "Stack", "default_state_dir"]

READY_TIMEOUT_S = 60.0
"""Kafka needs 3 s on two free cores; a busy machine with a cold disk may take ten times that."""

POLL_INTERVAL_S = 0.05

FREE_DISK_BYTES_MIN = 1 << 30
"""Kafka ends itself when its disk is full. A gigabyte holds the downloads (45 MB) and a day of trying."""

LOG_TAIL_LINES = 15

READY, STARTING, STOPPED = "ready", "starting", "stopped"


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """How a service is. `state` is ready, starting (runs, doesn't answer) or stopped."""

    name: str
    state: str
    ports: dict[str, int]
    pid: int | None
    log_file: Path


def default_state_dir() -> Path:
    """XDG state home / meterline / local."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "meterline" / "local"


def _no_progress(_service: str, _doing: str) -> None:
    """Say nothing."""


class Stack:
    """The services of one state directory. Several stacks may run beside one another on other ports."""

    def __init__(
        self, state_dir: Path, ports: Ports | None = None, services: Sequence[Service] | None = None
    ) -> None:
        self.state_dir = state_dir
        self.ports = ports or Ports.from_environment()
        self._cancelled = threading.Event()
        own: tuple[Service, ...] = (
            Kafka(state_dir / "kafka", self.ports, self._cancelled),
            ClickHouse(state_dir / "clickhouse", self.ports),
            Redis(state_dir / "redis", self.ports),
            StripeSandbox(state_dir / "stripe", self.ports),
        )
        self._services: Sequence[Service] = services or own

    def up(self, on_progress: Progress = _no_progress) -> list[str]:
        """Start what doesn't run, all at once; return when everything is ready. The names of the started.

        If one fails, or on Ctrl-C, what this call has started is stopped again.

        Raises:
            UserError: a port is taken, the disk is full, something isn't installed, a service failed.
        """
        self._check_installed()
        with self._locked():
            self._check_disk()
            waiting = [service for service in self._services if self._state(service) != READY]
            self._check_ports([service for service in waiting if self._record(service) is None])
            self._cancelled.clear()
            pool = ThreadPoolExecutor(max(1, len(waiting)))
            try:
                starts = [pool.submit(self._start, service, on_progress) for service in waiting]
                done, _ = wait(starts, return_when=FIRST_EXCEPTION)
                for start in done:
                    start.result()
            except BaseException:  # Ctrl-C, too: what was begun is stopped
                self._cancelled.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stop_all(waiting, on_progress)
                raise
            pool.shutdown()
            return [service.name for service in waiting]

    def down(self, *, wipe: bool = False, on_progress: Progress = _no_progress) -> list[str]:
        """Stop what runs, all at once; with `wipe` also remove all it knew. The names of the stopped."""
        if not self.state_dir.exists():
            return []
        with self._locked():
            running = [service for service in self._services if self._record(service)]
            self._stop_all(running, on_progress)
            if wipe:
                shutil.rmtree(self.state_dir)
            return [service.name for service in running]

    def status(self) -> list[ServiceStatus]:
        """How each service is, in the stack's order."""
        statuses = []
        for service in self._services:
            record = self._record(service)
            statuses.append(
                ServiceStatus(
                    service.name,
                    self._state(service),
                    dict(service.ports()),
                    record.pid if record else None,
                    self.log_file(service.name),
                )
            )
        return statuses

    def environment(self) -> dict[str, str]:
        """The settings that point a process at this stack."""
        return {
            "METERLINE_KAFKA__BOOTSTRAP_SERVERS": f"{HOST}:{self.ports.kafka}",
            "METERLINE_CLICKHOUSE__HOST": HOST,
            "METERLINE_CLICKHOUSE__PORT": str(self.ports.clickhouse),
            "METERLINE_REDIS__URL": f"redis://{HOST}:{self.ports.redis}/0",
            "METERLINE_STRIPE__SANDBOX_URL": f"http://{HOST}:{self.ports.stripe}",
        }

    def log_file(self, name: str) -> Path:
        """Where a service's output goes; kept from start to start."""
        return self.state_dir / "logs" / f"{name}.log"

    def _start(self, service: Service, on_progress: Progress) -> None:
        found = self._record(service)
        # A killed process is one until its last thread is gone: what was found may be ending already.
        if found is None or not self._wait_ready(service, found, on_progress):
            command = service.prepare(lambda doing: on_progress(service.name, doing))
            if self._cancelled.is_set():
                return
            started = start_process(
                command, record_file=self._record_file(service), log_file=self.log_file(service.name)
            )
            if not self._wait_ready(service, started, on_progress):
                raise UserError(
                    f"{service.name} ended while starting. Its log says:\n{self._log_tail(service)}"
                )

    def _wait_ready(self, service: Service, record: ProcessRecord, on_progress: Progress) -> bool:
        """Wait until it is ready, or everything is cancelled; False if it ended before.

        Raises:
            UserError: it runs and doesn't become ready.
        """
        on_progress(service.name, "starting")
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not service.is_ready(record.pid):
            if self._cancelled.is_set():
                return True
            if not is_alive(record):
                return False
            if time.monotonic() > deadline:
                raise UserError(
                    f"{service.name} is not ready after {READY_TIMEOUT_S:.0f} s. Its log "
                    f"({self.log_file(service.name)}) says:\n{self._log_tail(service)}"
                )
            self._cancelled.wait(POLL_INTERVAL_S)
        on_progress(service.name, READY)
        return True

    def _stop_all(self, services: Sequence[Service], on_progress: Progress) -> None:
        with ThreadPoolExecutor(max(1, len(services))) as pool:
            list(pool.map(lambda service: self._stop(service, on_progress), services))

    def _stop(self, service: Service, on_progress: Progress) -> None:
        if record := self._record(service):
            on_progress(service.name, "stopping")
            if stop_process(record):
                service.stopped()
            on_progress(service.name, STOPPED)
        forget(self._record_file(service))

    def _state(self, service: Service) -> str:
        record = self._record(service)
        if record is None:
            return STOPPED
        return READY if service.is_ready(record.pid) else STARTING

    def _record(self, service: Service) -> ProcessRecord | None:
        return read_record(self._record_file(service))

    def _record_file(self, service: Service) -> Path:
        return self.state_dir / "run" / f"{service.name}.json"

    def _log_tail(self, service: Service) -> str:
        lines = self.log_file(service.name).read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:]) or "  (nothing)"

    def _check_installed(self) -> None:
        needed = {module for service in self._services for module in service.extra}
        if missing := sorted(module for module in needed if importlib.util.find_spec(module) is None):
            raise UserError(
                f"The local stack needs packages that are not installed ({', '.join(missing)}). "
                'Run: pip install "meterline[local]"'
            )

    def _check_disk(self) -> None:
        free = shutil.disk_usage(self.state_dir).free
        if free < FREE_DISK_BYTES_MIN:
            raise UserError(
                f"Only {free >> 20} MiB are free for {self.state_dir}; the local stack needs "
                f"{FREE_DISK_BYTES_MIN >> 20} MiB. Free some space, or set XDG_STATE_HOME to another disk."
            )

    def _check_ports(self, services: Sequence[Service]) -> None:
        taken = [
            f"  port {port} for {service.name}: set {port_variable(name)} to a free one"
            for service in services
            for name, port in service.ports().items()
            if not is_free(port)
        ]
        if taken:
            raise UserError(
                "Another process listens on a port of the local stack. Stop it, or move the port:\n"
                + "\n".join(taken)
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One `up` or `down` of a state directory at a time."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.state_dir, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(f"Another meterline up or down works on {self.state_dir}; wait for it") from None
        finally:
            os.close(descriptor)
