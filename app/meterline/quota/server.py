"""One Redis server as the library meets it: connections, the script that names it, what it must be like."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    UnixDomainSocketConnection,
)
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from meterline.errors import UserError
from meterline.quota.availability import Unreachable
from meterline.quota.keys import Keys, shard_of
from meterline.quota.scripts import info_fields, rendered, run_id_of

__all__ = ["Address", "Server", "require_safe"]

Address = tuple[str, int]
"""Host and port; of a server behind a socket its path, and any port."""

SLOTS = 16_384

log = logging.getLogger("meterline.quota")  # a library's: the program it runs in decides what is seen


class Server:
    """Where the buckets of one namespace are."""

    def __init__(self, pool: ConnectionPool, keys: Keys) -> None:
        """See `from_url`."""
        self._pool = pool
        self._keys = keys

    @classmethod
    def from_url(cls, url: str, namespace: str, *, connect_timeout_s: float) -> Server:
        """Nothing is connected yet.

        Raises:
            UserError: the address is wrong.
        """
        try:
            pool = ConnectionPool.from_url(
                url,
                protocol=2,
                decode_responses=False,
                socket_timeout=None,  # who calls measures the time of the whole call
                socket_connect_timeout=connect_timeout_s,
            )
        except ValueError as error:
            raise UserError(f"{url!r} is no address of a Redis server: {error}") from None
        return cls(pool, Keys(namespace))

    @property
    def address(self) -> Address:
        """Where it is."""
        settings = self._pool.connection_kwargs
        return settings.get("host", settings.get("path", "localhost")), settings.get("port", 6379)

    def at(self, address: Address) -> Server:
        """Another server of the same cluster: it takes the same password, and encrypts as this one does."""
        settings = {**self._pool.connection_kwargs, "host": address[0], "port": address[1]}
        kind = self._pool.connection_class
        if issubclass(kind, UnixDomainSocketConnection):
            del settings["path"]
            kind = Connection
        return Server(ConnectionPool(connection_class=kind, **settings), self._keys)

    def new_connection(self) -> AbstractConnection:
        """One that is not connected yet, and not shared."""
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py's
        return connection

    @asynccontextmanager
    async def connected(self, timeout_s: float) -> AsyncIterator[AbstractConnection]:
        """A connection for one exchange.

        Raises:
            TimeoutError: connecting and what is done with it take longer.
        """
        connection = self.new_connection()
        try:
            async with asyncio.timeout(timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's
                yield connection
        finally:
            await connection.disconnect(nowait=True)

    async def load_script(self, connection: AbstractConnection) -> str:
        """Make the server know the script; its text names the process that runs there now.

        Returns:
            The digest to call it by.
        """
        run_id = run_id_of(await _info(connection, "server"))
        if not connection.is_connected:
            # Sending would connect again, perhaps to a process with another run id.
            raise RedisConnectionError("Redis closed the connection")
        await connection.send_command("SCRIPT", "LOAD", rendered("bucket", run_id), check_health=False)
        digest: bytes = await connection.read_response(disable_decoding=True)
        return digest.decode()

    def call_head(self, digest: str, client_id: str) -> bytes:
        """A call of the script for a client in Redis' protocol, up to its last two arguments."""
        keys = self._keys.of_bucket_script(client_id)
        prefix = self._keys.provisional_prefix(shard_of(client_id))
        words = ["EVALSHA", digest, str(len(keys)), *keys, client_id, prefix]
        packed = [b"*%d\r\n" % (len(words) + 2)]
        for word in words:
            text = word.encode()
            packed.append(b"$%d\r\n%b\r\n" % (len(text), text))
        return b"".join(packed)

    async def look(self, timeout_s: float) -> bool:
        """Whether credits can be kept there.

        Returns:
            Whether it is one of several that share the keys, in a cluster.

        Raises:
            UserError: the password is refused, or the server can't keep credits safely.
            Unreachable: it doesn't answer, or is not ready.
        """
        try:
            async with self.connected(timeout_s) as connection:
                info = await _info(connection, "everything")
                masters = await _masters(connection) if info.get("cluster_enabled") == "1" else 1
        except (AuthenticationError, AuthorizationError) as error:
            raise UserError(f"Redis refuses to let us in: {error}") from None
        except (RedisError, OSError, TimeoutError) as error:
            raise Unreachable(str(error) or type(error).__name__) from None
        if info.get("loading", "0") != "0":
            # Until its file is read it says that it keeps none.
            raise Unreachable("Redis was started and is still loading")
        run_id_of(info)
        if hidden := require_safe(info):
            log.warning(
                "Redis does not tell whether it keeps credits safely; look yourself at %s", ", ".join(hidden)
            )
        return masters > 1

    async def slots(self, timeout_s: float) -> Mapping[int, Address]:
        """Which server has which slot of the cluster; nothing if it is in none.

        Raises:
            RedisError, OSError, TimeoutError: it doesn't tell, or not all of it.
        """
        async with self.connected(timeout_s) as connection:
            if (await _info(connection, "cluster")).get("cluster_enabled") != "1":
                return {}
            await connection.send_command("CLUSTER", "SLOTS", check_health=False)
            ranges = await connection.read_response(disable_decoding=True)
        return self._addresses(ranges)

    def _addresses(self, ranges: Sequence[Any]) -> Mapping[int, Address]:
        """First and last slot, then the master of each range: host, port and more."""
        found = {}
        for first, last, (host, port, *_), *_ in ranges:
            # A server that doesn't know its own name leaves it out: that by which it was reached will do.
            address = (host or b"").decode() or self.address[0], int(port)
            found.update(dict.fromkeys(range(first, last + 1), address))
        if len(found) < SLOTS:
            raise RedisError(f"{SLOTS - len(found)} slots of the cluster have no server")
        return found


def require_safe(info: Mapping[str, str]) -> list[str]:
    """Whether credits can be kept on a server, by its own words (INFO).

    Returns:
        What it doesn't tell, as managed servers may.

    Raises:
        UserError: without an append-only file, or it evicts keys.
    """
    if info.get("aof_enabled") == "0":
        raise UserError(
            "Redis keeps no append-only file: a restart would forget every reservation. Set `appendonly yes` "
            "and `appendfsync everysec` (or `always`)."
        )
    if info.get("maxmemory_policy", "noeviction") != "noeviction":
        raise UserError(
            f"Redis evicts keys when it is full (maxmemory-policy {info['maxmemory_policy']}): an evicted "
            "bucket would be credits forgotten. Set `maxmemory-policy noeviction`."
        )
    return [name for name in ("aof_enabled", "maxmemory_policy") if name not in info]


async def _masters(connection: AbstractConnection) -> int:
    """How many servers of a cluster share its keys; 1 where it doesn't tell, as some managed ones."""
    await connection.send_command("CLUSTER", "INFO", check_health=False)
    try:
        text: bytes = await connection.read_response(disable_decoding=True)
    except ResponseError:
        return 1
    return int(info_fields(text.decode(errors="replace")).get("cluster_size", 1))


async def _info(connection: AbstractConnection, section: str) -> dict[str, str]:
    await connection.send_command("INFO", section, check_health=False)
    text: bytes = await connection.read_response(disable_decoding=True)
    return info_fields(text.decode(errors="replace"))
