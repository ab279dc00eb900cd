"""The leases of a process: which clients are hot, and what their reservations became."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine, Sequence
from collections.abc import Set as AbstractSet
from math import ceil
from typing import Any, Final, Generic, TypeVar

from meterline.domain.buckets import parse_balance
from meterline.quota import operations
from meterline.quota.answers import Part, Reservation, credits_of
from meterline.quota.availability import Unreachable
from meterline.quota.errors import ReservationConflict, ReservationLapsed
from meterline.quota.lease import ROOM_SHARE, SMALL, Lease, LeasePlan, Submit, now_s

__all__ = ["Ended", "LeasePlan", "Leases"]

TURN_S: Final = 0.0005
"""Calls decided here never wait, and a task that only makes such calls would keep the loop for itself: after
so long in one turn of the loop the next call lets the others run."""
COOL_S: Final = 0.25
"""How long single calls are made after a lease was given back for want of credits."""
ENDED_MAX: Final = 100_000
"""Ended reservations remembered, to recognise a repeated call: twice as many at most."""
START: Final = 256
"""Reservations in a lease's first portion."""
COUNTED_S: Final = 0.1
CLIENTS_COUNTED_MAX: Final = 10_000

Known = TypeVar("Known")
Position = tuple[str, int, int]
"""Topic id, partition and offset: an event."""

log = logging.getLogger("meterline.quota")


class Ended(Generic[Known]):
    """The newest ended reservations, and something known of each; the oldest are forgotten."""

    def __init__(self) -> None:
        self.newer: dict[str, Known] = {}
        self.older: dict[str, Known] = {}

    def note(self, reservation_id: str, known: Known) -> None:
        """One more."""
        self.newer[reservation_id] = known
        self.trim()

    def trim(self) -> None:
        """Forget the oldest, if there are too many."""
        if len(self.newer) >= ENDED_MAX:
            self.older, self.newer = self.newer, {}

    def of(self, reservation_id: str) -> Known | None:
        """None: not known."""
        return self.newer.get(reservation_id) or self.older.get(reservation_id)


class Leases:
    """All leases of one process.

    Attributes:
        active: by client; what is decided from.
        held: reservations that were decided here: the lease, and the micro-credits they still hold.
        partly: reservations settled in part: what they held at first, and the positions named.
        told: of reservations settled here the hash of their parts; or the positions, named in several calls.
        opening: by client; done when there is a lease, or none can be had.
    """

    def __init__(
        self,
        submit: Submit,
        plan: LeasePlan,
        known: dict[str, Reservation],
        settled: Ended[str],
        voided: Ended[str],
    ) -> None:
        """None is open yet.

        Args:
            submit: sends an operation of a client.
            plan: when and how.
            known: reservations made at the server.
            settled: their clients; noted here, too.
            voided: likewise.
        """
        self.submit = submit
        self.plan = plan
        self.active: dict[str, Lease] = {}
        self.held: dict[str, tuple[Lease, int]] = {}
        self.opening: dict[str, asyncio.Future[None]] = {}
        self.settled = settled
        self.voided = voided
        self.is_closing = False
        self.known = known
        self.partly: dict[str, tuple[int, set[Position]]] = {}
        self.told: Ended[int | set[Position]] = Ended()
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

    def knows(self, reservation_id: str) -> bool:
        """Whether the id was used in this process."""
        return (
            reservation_id in self.held
            or reservation_id in self.known
            or reservation_id in self.settled.newer
            or reservation_id in self.settled.older
            or reservation_id in self.voided.newer
            or reservation_id in self.voided.older
        )

    def knows_any(self, reservation_ids: AbstractSet[str]) -> bool:
        """`knows` for many."""
        books = (
            self.held,
            self.known,
            self.settled.newer,
            self.settled.older,
            self.voided.newer,
            self.voided.older,
        )
        return not all(book.keys().isdisjoint(reservation_ids) for book in books if book)

    def again(self, client_id: str, reservation_id: str, micro: int, ttl_s: float) -> Reservation | None:
        """A reservation whose id was used in this process.

        Returns:
            The same once more, perhaps `done`; None: the server knows.

        Raises:
            ReservationConflict: other credits, or another client.
            ReservationLapsed: it was voided.
        """
        held = self.held.get(reservation_id)
        if held is not None:
            lease, left = held
            whole, _ = self.partly.get(reservation_id, (left, None))
            if lease.client_id != client_id or whole != micro:
                raise ReservationConflict(
                    f"{reservation_id!r} of {lease.client_id} holds {credits_of(whole):f} credits; "
                    f"{client_id} asked for {credits_of(micro):f}"
                )
            return Reservation(
                reservation_id, client_id, micro, ttl_s, lease.generation, done=False, covered=True
            )
        if self.voided.of(reservation_id) == client_id:
            raise ReservationLapsed(client_id, reservation_id)
        if self.settled.of(reservation_id) == client_id:
            return Reservation(reservation_id, client_id, micro, ttl_s, 0, done=True, covered=True)
        return None

    def new_parts(
        self, reservation_id: str, left: int, parts: Sequence[Part], *, final: bool
    ) -> Sequence[Part]:
        """Those that earlier calls of a reservation have not named: a repeated one frees nothing."""
        if final:
            _, named = self.partly.pop(reservation_id, (left, set()))
            self.told.note(reservation_id, named)
        else:
            _, named = self.partly.setdefault(reservation_id, (left, set()))
        new = [part for part in parts if part[:3] not in named]
        named.update(part[:3] for part in new)
        return new

    def not_told(self, reservation_id: str, parts: Sequence[Part]) -> Sequence[Part]:
        """Those that no lease has told the bucket: in a sum it can't know them again, it would count them."""
        told = self.told.of(reservation_id)
        if told is None:
            return parts
        if isinstance(told, int):
            return () if told == hash(parts) else parts
        return [part for part in parts if part[:3] not in told]

    def note_settled(self, client_id: str, names: Sequence[str], hashes: Sequence[int]) -> None:
        """Reservations of a client that ended here, and the hashes of their parts."""
        self.settled.newer.update(dict.fromkeys(names, client_id))
        self.settled.trim()
        self.told.newer.update(zip(names, hashes, strict=True))
        self.told.trim()

    def cool(self, client_id: str) -> None:
        """No lease of this client for a while."""
        self._not_before[client_id] = now_s() + COOL_S

    def forget(self, lease: Lease) -> None:
        """Decide nothing more with it."""
        if self.active.get(lease.client_id) is lease:
            del self.active[lease.client_id]

    def release(self, lease: Lease) -> None:
        """Its reservations go on by themselves: their settle and renew go to the server."""
        for reservation_id in [rid for rid, (holder, _) in self.held.items() if holder is lease]:
            _, left = self.held.pop(reservation_id)
            whole, named = self.partly.pop(reservation_id, (left, None))
            if named:
                self.told.note(reservation_id, named)
            self.known[reservation_id] = Reservation(
                reservation_id,
                lease.client_id,
                whole,
                self.plan.ttl_s,
                lease.generation,
                done=False,
                covered=True,
            )

    async def close(self, timeout_s: float) -> None:
        """State what was settled and give back what is free."""
        self.is_closing = True
        for lease in list(self.active.values()):
            lease.retire()
        if self._tasks:
            for lease in {lease for lease, _ in self.held.values()}:
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
