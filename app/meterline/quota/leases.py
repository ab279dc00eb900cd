"""The leases of a process: which clients are hot."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine
from math import ceil
from typing import Any, Final

from meterline.domain.buckets import parse_balance
from meterline.quota import operations
from meterline.quota.availability import Unreachable
from meterline.quota.lease import ROOM_SHARE, SMALL, Lease, LeasePlan, Submit, now_s
from meterline.quota.reservations import Reservations

__all__ = ["LeasePlan", "Leases"]

TURN_S: Final = 0.0005
"""Calls decided here never wait, and a task that only makes such calls would keep the loop for itself: after
so long in one turn of the loop the next call lets the others run."""
COOL_S: Final = 0.25
"""How long single calls are made after a lease was given back for want of credits."""
START: Final = 256
"""Reservations in a lease's first portion."""
COUNTED_S: Final = 0.1
CLIENTS_COUNTED_MAX: Final = 10_000

log = logging.getLogger("meterline.quota")


class Leases:
    """All leases of one process.

    Attributes:
        active: by client; what is decided from.
        reservations: all that this process knows, noted here, too.
        opening: by client; done when there is a lease, or none can be had.
    """

    def __init__(
        self,
        submit: Submit,
        plan: LeasePlan,
        reservations: Reservations,
    ) -> None:
        """None is open yet.

        Args:
            submit: sends an operation of a client.
            plan: when and how.
            reservations: of this process.
        """
        self.submit = submit
        self.plan = plan
        self.active: dict[str, Lease] = {}
        self.opening: dict[str, asyncio.Future[None]] = {}
        self.is_closing = False
        self.reservations = reservations
        self._loop = asyncio.get_running_loop()
        self._turn_began = 0.0
        self._is_turn_known = False
        self._counts: dict[str, int] = {}
        self._counted_since = now_s()
        self._calls_max = max(1, int(plan.calls_per_s * COUNTED_S))
        self._not_before: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def turn_is_long(self) -> bool:
        """Whether other tasks of the loop should get their turn."""
        now = time.monotonic()
        if self._is_turn_known:
            return now - self._turn_began > TURN_S
        self._is_turn_known = True
        self._turn_began = now
        self._loop.call_soon(self._end_turn)
        return False

    def note(self, client_id: str, micro: int, calls: int = 1) -> None:
        """Count calls that the server decides; many of one client soon open a lease."""
        count = self._counts.get(client_id, 0) + calls
        self._counts[client_id] = count
        if count < self._calls_max and len(self._counts) < CLIENTS_COUNTED_MAX:
            return
        now = now_s()
        is_hot = count >= self._calls_max and now - self._counted_since <= COUNTED_S
        if now - self._counted_since > COUNTED_S:
            self._counted_since = now
            self._counts.clear()
        else:
            self._counts[client_id] = 0
        if (
            is_hot
            and not self.is_closing
            and client_id not in self.opening
            and (self._not_before.get(client_id, 0.0) <= now)
        ):
            self.opening[client_id] = self._loop.create_future()
            self._start(self._open(client_id, micro))

    def cool(self, client_id: str) -> None:
        """No lease of this client for a while."""
        self._not_before[client_id] = now_s() + COOL_S

    def forget(self, lease: Lease) -> None:
        """Decide nothing more with it."""
        if self.active.get(lease.client_id) is lease:
            del self.active[lease.client_id]

    async def close(self, timeout_s: float) -> None:
        """State what was settled and give back what is free."""
        self.is_closing = True
        for lease in list(self.active.values()):
            lease.retire()
        if self._tasks:
            for lease in self.reservations.holders():
                lease.wake()
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _end_turn(self) -> None:
        self._is_turn_known = False

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a lease ended with an error", exc_info=error)

    async def _open(self, client_id: str, micro: int) -> None:
        """Take a lease, if there is enough for one, and keep it."""
        lease = None
        try:
            lease = await self._opened(client_id, micro)
        except Unreachable:
            self.cool(client_id)
        finally:
            self.opening.pop(client_id).set_result(None)
        if lease is not None:
            await lease.run()

    async def _opened(self, client_id: str, micro: int) -> Lease | None:
        balance = parse_balance((await self.submit(client_id, operations.BALANCE)).decode())
        share = int(balance.granted * self.plan.share_max)
        size = min(START * micro, share, balance.available // ROOM_SHARE)
        if size < SMALL * micro:
            self.cool(client_id)
            return None
        lease_id = f"lease/{uuid.uuid4().hex}"
        started, ttl_s = now_s(), self.plan.ttl_s
        answer = await self.submit(client_id, operations.reserve(lease_id, size, ceil(ttl_s * 1_000)))
        if not answer.startswith(b"g "):
            self.cool(client_id)
            return None
        lease = Lease(self, client_id, lease_id, micro=size, balance=balance, deadline=started + ttl_s)
        if self.is_closing:
            lease.retire()
        else:
            self.active[client_id] = lease
        return lease
