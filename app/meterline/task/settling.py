"""`Settler`: tells the credit buckets what Kafka has acknowledged, until they have heard it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from meterline.errors import MeterlineError, RetryLater
from meterline.quota import Part
from meterline.quota.answers import PARTS_MAX
from meterline.task.holds import HeldReservations
from meterline.task.lanes import Published

__all__ = ["Settler", "Settles"]

WAITING_MAX = 100_000
"""Reservations to be settled while Redis is away. Those beyond are not: their holds end when the log has
passed their deadlines, after it has charged them."""
AT_ONCE = 100
"""Awaited together: the library makes one call to Redis of them, and others must not wait for it."""
TRY_AGAIN_S = 0.5

log = logging.getLogger("meterline.task")


class Settles(Protocol):
    """The part of the credit buckets that this needs."""

    async def settle(
        self, reservation_id: str, parts: Sequence[Part], *, final: bool = ..., client_id: str | None = ...
    ) -> None:
        """Tell what Kafka has acknowledged under it."""


class _Open:
    """What is not yet told of one reservation."""

    __slots__ = ("client_id", "final", "parts")

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.parts: list[Part] = []
        self.final = False


class Settler:
    """For one event loop; `add` from there too."""

    def __init__(self, buckets: Settles, holds: HeldReservations) -> None:
        self._buckets = buckets
        self._holds = holds
        self._open: dict[str, _Open] = {}
        self._changed = asyncio.Event()
        self._telling = 0

    @property
    def is_idle(self) -> bool:
        """Whether everything was told."""
        return not self._open and not self._telling

    def add(self, published: Sequence[Published]) -> None:
        """Events with a reservation are told under it; of the others the log alone tells."""
        for event, final, topic_id, partition, offset in published:
            rid = event.reservation_id
            if rid is None:
                continue
            if offset < 0 or (rid not in self._open and len(self._open) >= WAITING_MAX):
                # Its place is unknown, or too many wait: the hold must stand until the log has charged it.
                self._open.pop(rid, None)
                self._holds.drop(rid)
                continue
            told = self._open.setdefault(rid, _Open(event.client_id))
            credits_micro = event.credits_micro if event.billable else 0
            told.parts.append(Part(topic_id, partition, offset, credits_micro))
            told.final = told.final or final
        self._changed.set()

    async def run(self) -> None:
        """Settle for ever."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not await self.settle_all():
                await asyncio.sleep(TRY_AGAIN_S)
                self._changed.set()

    async def settle_all(self) -> bool:
        """Tell everything once; False: something is to be told again."""
        waiting, self._open = list(self._open.items()), {}
        self._telling += len(waiting)
        try:
            outcomes = []
            for begin in range(0, len(waiting), AT_ONCE):
                some = waiting[begin : begin + AT_ONCE]
                outcomes += await asyncio.gather(*(self._settle(rid, told) for rid, told in some))
        finally:
            self._telling -= len(waiting)
        return all(outcomes)

    async def _settle(self, rid: str, told: _Open) -> bool:
        try:
            while len(told.parts) > PARTS_MAX:
                some = told.parts[:PARTS_MAX]
                await self._buckets.settle(rid, some, final=False, client_id=told.client_id)
                told.parts = told.parts[PARTS_MAX:]
            await self._buckets.settle(rid, told.parts, final=told.final, client_id=told.client_id)
        except RetryLater as error:
            log.debug("reservation %s is settled later: %s", rid, error)
            later = self._open.setdefault(rid, _Open(told.client_id))
            later.parts[:0] = told.parts
            later.final = later.final or told.final
            return False
        except MeterlineError as error:
            log.warning("reservation %s was not settled; the log charges it: %s", rid, error)
        if told.final:
            self._holds.drop(rid)
        return True
