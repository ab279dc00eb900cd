"""Which server has a client's credits, and a batcher for each: one server, or those of a Redis Cluster.

All keys of a shard are in one slot, so there are 64 ways to know. They change when a replica takes over or
slots move: a server that doesn't have a client's keys says so, one that is gone says nothing. In both cases
the ways are asked for again, of whoever answers. What is called meanwhile is answered as if Redis were away,
and may be repeated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from redis.crc import key_slot
from redis.exceptions import RedisError

from meterline.errors import UserError
from meterline.quota.availability import Unreachable
from meterline.quota.batching import Batcher
from meterline.quota.keys import SHARDS, shard_of
from meterline.quota.server import Address, Server

__all__ = ["Routes"]

ASK_AGAIN_S: Final = 1.0
"""Between two questions for the routes: a take-over takes seconds, and many calls notice it at once."""

MakeBatcher = Callable[[Server, Callable[[], None]], Batcher]

log = logging.getLogger("meterline.quota")  # a library's: the program it runs in decides what is seen


class Routes:
    """What `Batcher` is for one server, for one or several that share the clients."""

    def __init__(self, server: Server, make_batcher: MakeBatcher, *, timeout_s: float) -> None:
        """Until others are known, all clients' credits are looked for at this server.

        Args:
            server: any of the cluster.
            make_batcher: for a server, and what it calls when a client's keys are not there.
            timeout_s: how long one server may take to tell the routes.
        """
        self._make_batcher = make_batcher
        self._timeout_s = timeout_s
        first = make_batcher(server, self._learn_soon)
        self._batchers: dict[Address, Batcher] = {server.address: first}
        self._of_shard: list[Batcher] = [first] * SHARDS
        self._learning: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    def route(self, client_id: str) -> Batcher:
        """To the server that has the client's keys."""
        batcher = self._of_shard[shard_of(client_id)]
        if batcher.availability.tripped:
            self._learn_soon()
        return batcher

    async def look(self) -> None:
        """Whether credits can be kept at the first server, and who else there is.

        Raises:
            UserError: a server refuses the password, or can't keep credits safely.
        """
        (batcher,) = self._batchers.values()
        try:
            if await batcher.server.look(self._timeout_s):
                await self._learn()
        except Unreachable as error:
            batcher.availability.trip(str(error))

    async def _learn(self) -> None:
        """Ask for the routes, and take them.

        Raises:
            Unreachable: no server tells.
            UserError: a new one refuses the password, or can't keep credits safely.
        """
        reason = ""
        for batcher in self._batchers.values():
            try:
                of_slots = await batcher.server.slots(self._timeout_s)
            except (RedisError, OSError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
                continue
            if of_slots:
                await self._take([of_slots[key_slot(b"{%02d}" % shard)] for shard in range(SHARDS)])
            return
        raise Unreachable(f"no server of the cluster tells who has which slots: {reason}")

    async def close(self) -> None:
        """Let what is on its way arrive; see `Batcher.close`."""
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.gather(self._learning, return_exceptions=True)
        await asyncio.gather(*self._leaving, *(batcher.close() for batcher in self._batchers.values()))

    async def _take(self, addresses: list[Address]) -> None:
        some = next(iter(self._batchers.values())).server
        for address in sorted(set(addresses) - self._batchers.keys()):
            server = some.at(address)
            away = ""
            try:
                await server.look(self._timeout_s)
            except Unreachable as error:
                away = str(error)
            batcher = self._batchers[address] = self._make_batcher(server, self._learn_soon)
            if away:
                batcher.availability.trip(away)
        self._of_shard = [self._batchers[address] for address in addresses]
        for gone in self._batchers.keys() - set(addresses):
            leaving = asyncio.get_running_loop().create_task(self._batchers.pop(gone).close())
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    def _learn_soon(self) -> None:
        if self._learning is None or self._learning.done():
            self._learning = asyncio.get_running_loop().create_task(self._learn_again())

    async def _learn_again(self) -> None:
        try:
            await self._learn()
        except Unreachable:
            pass  # the breaker in front of each of them says so
        except UserError as error:
            log.warning("the ways to clients' credits stay as they are: %s", error)
        await asyncio.sleep(ASK_AGAIN_S)
