"""`Desk`: what the tasks of one process share."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from decimal import Decimal
from typing import Any, Protocol

from meterline.domain.events import UsageEvent
from meterline.producer.recent import RecentEvents
from meterline.quota import Part
from meterline.task.holds import HeldReservations
from meterline.task.records import SpooledEvents

__all__ = ["Buckets", "Credits", "Desk", "Keeps"]

log = logging.getLogger("meterline.task")

Credits = Decimal | int | str


class Buckets(Protocol):
    """The part of `CreditBuckets` that tasks need."""

    async def reserve(
        self,
        client_id: str,
        credits: Credits,  # noqa: A002 - the library's word
        *,
        reservation_id: str,
        ttl_s: float = ...,
    ) -> object:
        """Set credits aside, or raise why not."""

    async def settle(
        self, reservation_id: str, parts: Sequence[Part], *, final: bool = ..., client_id: str | None = ...
    ) -> None:
        """Tell what Kafka has acknowledged under it."""

    async def void(self, reservation_id: str, *, client_id: str | None = ...) -> None:
        """Give back what was set aside: no usage was written anywhere."""

    async def renew(self, reservation_id: str, ttl_s: float = ..., *, client_id: str | None = ...) -> None:
        """Keep it set aside for `ttl_s` from now."""


class Keeps(Protocol):
    """Where finished usage becomes durable: the spool, or the fake's list."""

    def admit(self) -> None:
        """Keep room for one task that begins, or raise why there is none."""

    def release(self) -> None:
        """The task ended."""

    def append(self, records: Sequence[bytes]) -> Future[None]:
        """Keep records, all or none; done when they are durable."""


class Desk:
    """What the tasks of one process share. All but `note` and `forget` belongs to one event loop.

    Args:
        ttl_s: how long a hold stands without being renewed.
        require_sound: raises what keeps finished usage from reaching Kafka for good.
    """

    def __init__(
        self,
        buckets: Buckets,
        kept: Keeps,
        holds: HeldReservations,
        *,
        ttl_s: float,
        require_sound: Callable[[], None] = lambda: None,
    ) -> None:
        self.buckets, self.kept, self.holds, self.ttl_s = buckets, kept, holds, ttl_s
        self.require_sound = require_sound
        self.records = SpooledEvents()
        self.is_closed = False
        self._lock = threading.Lock()
        self._recent = RecentEvents()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether something goes on for tasks that were left."""
        return bool(self._background)

    def note(self, event: UsageEvent) -> None:
        """Remember a charge, from any thread.

        Raises:
            InvalidUsage: another one has its id; only one of them would be billed.
        """
        with self._lock:
            self._recent.note(event)

    def forget(self, event: UsageEvent) -> None:
        """It never became durable."""
        with self._lock:
            self._recent.forget(event)

    async def see_through(self, work: Coroutine[Any, Any, None]) -> None:
        """Await it; a cancelled caller leaves, and it goes on."""
        await asyncio.shield(self.leave_behind(work))

    def leave_behind(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let it go on by itself; `end` waits for it."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    async def end(self) -> None:
        """Take no new task, and wait for what goes on."""
        self.is_closed = True
        while self._background:
            await asyncio.wait(self._background)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its caller is told, if there still is one.
            log.debug("the end of a task failed: %s", error)
