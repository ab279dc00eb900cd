"""The services that are Python processes of ours: ClickHouse's engine and the Stripe sandbox."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from meterline.local.ports import Ports
from meterline.local.service import answering_pid

__all__ = ["ClickHouse", "StripeSandbox"]


class ClickHouse:
    """chDB behind the native protocol."""

    name = "clickhouse"
    extra = ("chdb",)

    def __init__(self, directory: Path, ports: Ports) -> None:
        self._directory = directory
        self._tcp, self._http = ports.clickhouse, ports.clickhouse_http

    def ports(self) -> dict[str, int]:
        """Native and HTTP."""
        return {"clickhouse": self._tcp, "clickhouse_http": self._http}

    def prepare(self, progress: Callable[[str], None]) -> list[str]:
        """This Python, our server module."""
        progress("loading the engine")
        ports = ["--tcp", str(self._tcp), "--http", str(self._http)]
        return [
            sys.executable,
            "-m",
            "meterline.local.clickhouse",
            *ports,
            "--data-dir",
            str(self._directory),
        ]

    def is_ready(self, pid: int) -> bool:
        """Both listeners are open before the HTTP one answers."""
        return answering_pid(self._http) == pid

    def stopped(self) -> None:
        """Nothing to tidy up."""


class StripeSandbox:
    """Stripe's meters, customers and meter events, with their rules and a memory."""

    name = "stripe"
    extra = ("aiohttp",)

    def __init__(self, directory: Path, ports: Ports) -> None:
        self._directory = directory
        self._port = ports.stripe

    def ports(self) -> dict[str, int]:
        """One."""
        return {"stripe": self._port}

    def prepare(self, progress: Callable[[str], None]) -> list[str]:
        """This Python, the sandbox module."""
        progress("reading its journal")
        options = ["--port", str(self._port), "--state-dir", str(self._directory)]
        return [sys.executable, "-m", "meterline.local.sandbox", *options]

    def is_ready(self, pid: int) -> bool:
        """It answers with its own pid."""
        return answering_pid(self._port) == pid

    def stopped(self) -> None:
        """Nothing to tidy up."""
