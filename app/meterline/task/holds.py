"""`HeldReservations`: renews every hold of this process until its usage is settled."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Protocol

from meterline.errors import MeterlineError

__all__ = ["SPOOLED_MAX", "HeldReservations", "Renews"]

SPOOLED_MAX = 100_000
"""Holds of spooled usage that are renewed. Kafka away for hours can leave more; those end when the log has
passed their deadline, and their usage then counts as it comes, without a hold."""
RENEW_SHARE = 3
"""Renewed when a third of the time to live has passed: two tries may fail."""
AT_ONCE = 100
"""Renewals awaited together: the library makes one call to Redis of them, and others must not wait for it."""
SPOOLED_S = 2.0
"""What is still in the spool after so long gets its longer time: most usage is in Kafka before."""
TICK_SHARE = 10
TICK_S_MAX = 1.0

log = logging.getLogger("meterline.task")


class Renews(Protocol):
    """The part of the credit buckets that this needs."""

    async def renew(self, reservation_id: str, ttl_s: float = ..., *, client_id: str | None = ...) -> None:
        """Keep it set aside for `ttl_s` from now."""


@dataclass(slots=True)
class _Hold:
    client_id: str
    ttl_s: float
    renew_at: float
    is_spooled: bool = False


class HeldReservations:
    """For one event loop.

    Args:
        ttl_s: of a hold while its work runs.
        ttl_spooled_s: of a hold whose usage is spooled: longer, so that a killed process can come back.
    """

    def __init__(self, buckets: Renews, ttl_s: float, ttl_spooled_s: float) -> None:
        self._buckets = buckets
        self._ttl_s, self._ttl_spooled_s = ttl_s, ttl_spooled_s
        self._holds: dict[str, _Hold] = {}
        self._spooled = 0

    def __len__(self) -> int:
        return len(self._holds)

    def add(self, reservation_id: str, client_id: str) -> None:
        """It was granted, for `ttl_s`; the work begins."""
        renew_at = time.monotonic() + self._ttl_s / RENEW_SHARE
        self._holds[reservation_id] = _Hold(client_id, self._ttl_s, renew_at)

    def find(self, reservation_id: str, client_id: str) -> None:
        """Its usage was found in a spool: renewed at once, whatever is left of it."""
        if reservation_id not in self._holds:
            self._holds[reservation_id] = _Hold(client_id, self._ttl_s, 0.0)
            self.lengthen(reservation_id)

    def lengthen(self, reservation_id: str) -> None:
        """Its usage goes to the spool."""
        if self._spooled >= SPOOLED_MAX:
            self.drop(reservation_id)
        hold = self._holds.get(reservation_id)
        if hold is not None and not hold.is_spooled:
            self._spooled += 1
            hold.is_spooled = True
            hold.ttl_s = self._ttl_spooled_s
            hold.renew_at = min(hold.renew_at, time.monotonic() + SPOOLED_S)

    def drop(self, reservation_id: str) -> None:
        """It ended, or may end by itself."""
        hold = self._holds.pop(reservation_id, None)
        if hold is not None and hold.is_spooled:
            self._spooled -= 1

    async def run(self) -> None:
        """Renew for ever."""
        pause_s = min(TICK_S_MAX, self._ttl_s / TICK_SHARE)
        while True:
            await self.renew_due()
            await asyncio.sleep(pause_s)

    async def renew_due(self) -> None:
        """Renew what is due, all of it."""
        now = time.monotonic()
        due = [rid for rid, hold in self._holds.items() if hold.renew_at <= now]
        for begin in range(0, len(due), AT_ONCE):
            await asyncio.gather(*map(self._renew, due[begin : begin + AT_ONCE]))

    async def _renew(self, reservation_id: str) -> None:
        hold = self._holds.get(reservation_id)
        if hold is None:
            return
        ttl_s = hold.ttl_s
        hold.renew_at = time.monotonic() + ttl_s / RENEW_SHARE
        try:
            await self._buckets.renew(reservation_id, ttl_s, client_id=hold.client_id)
        except MeterlineError as error:
            # Redis is away, or the hold is gone: the work goes on, and the log charges what was done.
            hold.renew_at = time.monotonic() + self._ttl_s / TICK_SHARE
            log.debug("hold %s was not renewed: %s", reservation_id, error)
