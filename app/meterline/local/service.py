"""The port between the stack and a service: what every service can tell and do."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from meterline.local.ports import HOST

__all__ = ["Progress", "Service", "answering_pid"]

Progress = Callable[[str, str], None]
"""Called from several threads: service, what it does now."""

PROBE_TIMEOUT_S = 1.0


class Service(Protocol):
    """One background process of the stack."""

    @property
    def name(self) -> str:
        """What people call it; also the name of its log and its pid file."""

    @property
    def extra(self) -> tuple[str, ...]:
        """Modules of the `local` extra it needs."""

    def ports(self) -> Mapping[str, int]:
        """The ports it listens on, by their names in `Ports`."""

    def prepare(self, progress: Callable[[str], None]) -> list[str]:
        """Its command line, after what must be there before: downloads, formatted storage.

        Raises:
            UserError: something is missing that the user must provide.
        """

    def is_ready(self, pid: int) -> bool:
        """Whether it answers, and it is process `pid` that answers, not somebody else on its port."""

    def stopped(self) -> None:
        """Called after it ended by itself on SIGTERM."""


def answering_pid(port: int) -> int | None:
    """Which process says it answers GET /healthz on a port."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        address = f"http://{HOST}:{port}/healthz"
        with urllib.request.urlopen(address, timeout=PROBE_TIMEOUT_S) as answer:
            body: Any = json.load(answer)
            return int(body["pid"])
    return None
