"""Leases: a very hot client's credits are taken in portions, and decided in this process.

A lease is a reservation whose holder is this process. The holder states it anew with numbered messages, each
of which says everything: how much it still needs, and which parts were settled since the last one. The rules
(the model's Q7), and what each prevents:

* A statement is absolute, has a number, and one at a time is on its way, repeated unchanged until it is
  answered: a copy that arrives late or twice changes nothing.
* What is given back is no longer decided from, *before* the statement leaves.
* A statement that carries parts never raises the lease, one that raises it carries none: a refused raise
  leaves the hold as it was, parts included, and their credits would be counted as free again.
* A rebuilt bucket takes a lease as it is stated, unasked: credits that a raise got that way are not used.
* After its own deadline, by a clock that runs while the machine sleeps, the holder decides nothing.
* A lapsed lease is gone. Work decided under it goes on as reservations of its own.

A lease is kept small: a share of the budget, an eighth of what is left, no more than the demand. Near zero it
is given back, and each reservation is decided at the server again.

What a lease does not know: ids of other processes. The same reservation id in two processes at once is two
holds (never a charge: the log charges events).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from meterline import metrics
from meterline.domain.buckets import BucketBalance, parse_balance
from meterline.logs import get_logger
from meterline.quota import operations
from meterline.quota.answers import Outcome, Part, Reservation, credits_of, parts_checked
from meterline.quota.availability import Unreachable
from meterline.quota.errors import ReservationConflict, ReservationLapsed

__all__ = ["Ended", "Lease", "LeasePlan", "Leases"]

TURN_S: Final = 0.0005
"""Calls decided here never wait, and a task that only makes such calls would keep the loop for itself: after
so long in one turn of the loop the next call lets the others run."""
PARTS_WAITING_MAX: Final = 8_000
"""Settled parts that wait for a statement. At this limit settle waits for Redis."""
STATEMENT_PARTS_MAX: Final = 2_000
"""Of one statement, about 6 ms of the server's time. So many don't wait for the interval."""
RETRY_PAUSE_S: Final = 0.05
ROOM_SHARE: Final = 8
"""A lease takes at most this fraction of what is left, so that several processes find some."""
SMALL: Final = 4
"""A lease of fewer reservations than this is not worth its messages."""
RETIRE_AFTER_S: Final = 60.0
"""Then a lease is replaced by a new one: reservations that nobody ended can't keep an old one for ever."""
COOL_S: Final = 0.25
"""How long single calls are made after a lease was given back for want of credits."""
ENDED_MAX: Final = 100_000
"""Ended reservations remembered, to recognise a repeated call: twice as many at most."""

SPENT_SHARE: Final = 4
"""A lease grows until one round of statements spends less than this fraction of it."""
START: Final = 256
"""Reservations in a lease's first portion."""
COUNTED_S: Final = 0.1
CLIENTS_COUNTED_MAX: Final = 10_000

GRANTED: Final = metrics.QUOTA_DECISIONS.labels("granted")
NOBODYS: Final = (None, 0)
Submit = Callable[[str, operations.Op], "asyncio.Future[bytes]"]

_new_reservation = tuple.__new__  # the generated __new__ takes twice as long
_clock_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

log = get_logger(__name__)


def now_s() -> float:
    """Seconds of a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(_clock_id)


@dataclass(frozen=True, slots=True)
class LeasePlan:
    """When and how this process takes leases.

    Attributes:
        calls_per_s: reservations of one client from which on it gets a lease.
        share_max: of the client's granted credits that the lease of one process may hold at most; with many
            processes, choose the share of all divided by their number.
        ttl_s: how long a lease stands without a statement: what a killed process strands, and for how long.
        interval_ms: settled parts are stated at least so often.
    """

    calls_per_s: float = 200.0
    share_max: float = 0.01
    ttl_s: float = 10.0
    interval_ms: float = 5.0


class Lease:
    """Credits of one client that this process decides about.

    `free + decided + unstated` is what the bucket holds for it, as far as this process knows.

    Attributes:
        free: can be decided; micro-credits, as all amounts here. Below zero after the bucket gave less.
        decided: reserved by work that has not ended.
        unstated: settled by parts that no statement has named yet.
        deadline: by `now_s`: nothing is decided after it.
    """

    def __init__(
        self,
        leases: Leases,
        client_id: str,
        reservation_id: str,
        *,
        micro: int,
        balance: BucketBalance,
        deadline: float,
    ) -> None:
        """A reservation the bucket has granted. `run` keeps it.

        Args:
            leases: of this process.
            client_id: whose credits.
            reservation_id: of the lease itself.
            micro: what was reserved.
            balance: of the bucket just before.
            deadline: of the reservation, by `now_s`.
        """
        self.client_id = client_id
        self.reservation_id = reservation_id
        self.generation = balance.generation
        self.free = micro
        self.decided = 0
        self.unstated = 0
        self.deadline = deadline
        self.is_retired = False
        self._leases = leases
        self._held = leases.held
        self._plan = leases.plan
        self._loop = asyncio.get_running_loop()
        self._parts: list[Part] = []
        self._covers: list[int] = []
        self._seq = 0
        self._ttl_s = leases.plan.ttl_s
        self._live_until = 0.0
        self._retire_at = now_s() + RETIRE_AFTER_S
        self._size = micro
        self._low = micro // 2
        self._spent = self._takes = 0
        self._request = 1
        self._missed = 0
        self._granted, self._available, self._is_open = balance.granted, balance.available, True
        self._share = 0
        self._used_at = now_s()
        self._waker: asyncio.Future[None] | None = None
        self._is_woken = False
        self._returned: asyncio.Future[None] = self._loop.create_future()
        self._room: asyncio.Future[None] | None = None
        self._refilled: asyncio.Future[None] | None = None

    def take(self, reservation_id: str, micro: int, ttl_s: float) -> Reservation | None:
        """Decide here.

        Returns:
            None: this lease can't; ask the server.

        Raises:
            ReservationConflict: the id is taken.
        """
        now = now_s()
        if micro > self.free or now >= self.deadline:
            self._missed += micro
            self._request = micro
            self.wake()
            return None
        if self._leases.knows(reservation_id):
            return self._leases.again(self.client_id, reservation_id, micro, ttl_s)
        self.free -= micro
        self.decided += micro
        self._spent += micro
        self._takes += 1
        self._held[reservation_id] = (self, micro)
        ends = now + ttl_s
        self._live_until = max(self._live_until, ends)
        if self.free < self._low or ends > self.deadline:
            self._request = micro
            self._ttl_s = max(self._ttl_s, ttl_s)
            self.wake()
        return _new_reservation(
            Reservation, (reservation_id, self.client_id, micro, ttl_s, self.generation, False, True)
        )

    def take_many(self, asked: Sequence[tuple[str, int]], ttl_s: float) -> list[Outcome | None]:
        """`take` for many; a conflict is an outcome here.

        The same steps once more, without a call for each: this loop is why there is a bulk call.
        """
        now = now_s()
        ends = now + ttl_s
        free = self.free if now < self.deadline else 0
        first, missed, missed_micro = free, 0, 0
        client_id, generation, held, leases = self.client_id, self.generation, self._held, self._leases
        known, newer, older = leases.known, leases.settled.newer, leases.settled.older
        void_newer, void_older = leases.voided.newer, leases.voided.older
        outcomes: list[Outcome | None] = []
        for reservation_id, micro in asked:
            if (
                reservation_id in held
                or reservation_id in known
                or reservation_id in newer
                or reservation_id in older
                or reservation_id in void_newer
                or reservation_id in void_older
            ):
                outcomes.append(leases.again_or_why_not(client_id, reservation_id, micro, ttl_s))
            elif micro > free:
                missed += 1
                missed_micro += micro
                outcomes.append(None)
            else:
                free -= micro
                held[reservation_id] = (self, micro)
                outcomes.append(
                    _new_reservation(
                        Reservation, (reservation_id, client_id, micro, ttl_s, generation, False, True)
                    )
                )
        taken = first - free
        self.free -= taken
        self.decided += taken
        self._spent += taken
        self._takes += len(asked) - missed
        self._missed += missed_micro
        self._live_until = max(self._live_until, ends)
        if missed or self.free < self._low or ends > self.deadline:
            self._request = max(1, (taken + missed_micro) // len(asked))
            self._ttl_s = max(self._ttl_s, ttl_s)
            self.wake()
        return outcomes

    def settle_many(self, settled: Iterable[tuple[str, Sequence[Part]]]) -> list[tuple[str, Sequence[Part]]]:
        """`settle`, final, for many.

        Returns:
            Those that are not of this lease, or need a closer look.
        """
        others: list[tuple[str, Sequence[Part]]] = []
        held, note = self._held, self._leases.settled
        ended, kept, covers = note.newer, self._parts, self._covers
        if not kept:
            self._loop.call_later(self._plan.interval_ms / 1_000, self.wake)
        decided = unstated = 0
        partly = self._leases.partly
        try:
            for reservation_id, parts in settled:
                holder, micro = held.get(reservation_id, NOBODYS)
                if holder is not self or partly:
                    others.append((reservation_id, parts))
                    continue
                left = micro
                for part in parts_checked(parts):
                    cover = min(left, part[3])
                    left -= cover
                    kept.append(part)
                    covers.append(cover)
                del held[reservation_id]
                ended[reservation_id] = self.client_id
                decided += micro
                unstated += micro - left
        finally:  # a part that can't be accepted ends the call, but not what was noted before it
            self.decided -= decided
            self.unstated += unstated
            self.free += decided - unstated
            note.trim()
        if len(kept) >= STATEMENT_PARTS_MAX:
            self.wake()
        return others

    def settle(self, reservation_id: str, micro: int, parts: Sequence[Part], *, final: bool) -> None:
        """Note settled parts of a reservation that has `micro` left; the next statement names them."""
        if not self._parts:
            self._loop.call_later(self._plan.interval_ms / 1_000, self.wake)
        if not final or self._leases.partly:
            parts = self._leases.new_parts(reservation_id, micro, parts, final=final)
        left = micro
        for part in parts:
            cover = min(left, part[3])
            left -= cover
            self._parts.append(part)
            self._covers.append(cover)
        self.unstated += micro - left
        if final:
            del self._held[reservation_id]
            self._leases.settled.note(reservation_id, self.client_id)
            self.decided -= micro
            self.free += left
        else:
            self._held[reservation_id] = (self, left)
            self.decided -= micro - left
        if len(self._parts) >= STATEMENT_PARTS_MAX:
            self.wake()

    def void(self, reservation_id: str, micro: int) -> None:
        """The credits of a reservation can be decided again."""
        del self._held[reservation_id]
        ended = self._leases.voided
        if self._leases.partly.pop(reservation_id, None) is not None:
            ended = self._leases.settled
        ended.note(reservation_id, self.client_id)
        self.decided -= micro
        self.free += micro

    def renew(self, ttl_s: float) -> None:
        """Keep the lease at least so long.

        Raises:
            Unreachable: its deadline has passed, and whether it still stands is not known.
        """
        now = now_s()
        self._live_until = max(self._live_until, now + ttl_s)
        if now + ttl_s > self.deadline:
            self._ttl_s = max(self._ttl_s, ttl_s)
            self.wake()
        if now >= self.deadline:
            raise Unreachable("the lease could not be prolonged in time")

    async def refill(self) -> None:
        """Wait for the next round of statements: it may bring more than a call to the server would."""
        if not self.is_retired and now_s() < self.deadline:
            if self._refilled is None:
                self._refilled = self._loop.create_future()
            self.wake()
            await asyncio.shield(self._refilled)

    async def room(self) -> None:
        """Wait until more settled parts may be noted."""
        while len(self._parts) >= PARTS_WAITING_MAX and not self._returned.done():
            if self._room is None:
                self._room = self._loop.create_future()
            self.wake()
            await asyncio.shield(self._room)

    def retire(self) -> None:
        """Decide nothing more here; what is free goes back with the next statement."""
        self.is_retired = True
        self._leases.forget(self)
        self.wake()

    async def give_back(self) -> None:
        """Retire, and wait until what was free is back in the bucket (or the lease is gone)."""
        self.retire()
        await asyncio.shield(self._returned)

    def wake(self) -> None:
        """State the lease soon."""
        if self._waker is None:
            self._is_woken = True
        elif not self._waker.done():
            self._waker.set_result(None)

    # ------------------------------------------------------------------ the holder

    async def run(self) -> None:
        """Keep the lease until it has lapsed, or nothing of it is left."""
        try:
            while await self._state():
                if self._is_over():
                    await self._end()
                    return
                await self._pause()
        finally:
            self._lapse()

    async def _pause(self) -> None:
        if not self._is_woken:
            self._waker = self._loop.create_future()
            timer = self._loop.call_later(self._plan.ttl_s / 3, self.wake)
            try:
                await self._waker
            finally:
                timer.cancel()
                self._waker = None
        self._is_woken = False

    async def _state(self) -> bool:
        """One round of statements: what was settled, what is given back; then what more is needed.

        Returns:
            Whether the lease stands.
        """
        target = self._target()
        if self.free > 2 * target:
            self.free = target
        parts, self._parts = self._parts[:STATEMENT_PARTS_MAX], self._parts[STATEMENT_PARTS_MAX:]
        self.unstated -= sum(self._covers[:STATEMENT_PARTS_MAX])
        del self._covers[:STATEMENT_PARTS_MAX]
        refilled, self._refilled = self._refilled, None
        try:
            if not await self._say(self._stands_for(), parts):
                return False
            if self._room is not None and len(self._parts) < PARTS_WAITING_MAX:
                self._room.set_result(None)
                self._room = None
            if self.is_retired:
                if self.free <= 0 and not self._returned.done():
                    self._returned.set_result(None)
            elif self.free <= target // 2 and self._is_open:
                self._low = target // 2
                hold = min(target + self.decided + self.unstated, self._share)
                if hold > self._stands_for() and not await self._say(hold, ()):
                    return False
        finally:
            if refilled is not None:
                refilled.set_result(None)
        if self._parts:
            self._is_woken = True
        return True

    def _stands_for(self) -> int:
        """What the bucket holds for this lease, as far as is known here."""
        return self.free + self.decided + self.unstated

    async def _say(self, hold: int, parts: Sequence[Part]) -> bool:
        """Make one statement, the same again until it is answered; in the same call, look at the bucket.

        Returns:
            Whether the lease stands.
        """
        self._seq += 1
        is_raise = hold > self._stands_for()
        ttl_s = self._ttl_s
        op = operations.lease(
            self.reservation_id,
            self._seq,
            max(hold, 0),
            parts,
            ttl_ms=ceil(ttl_s * 1_000),
            generation=self.generation,
        )
        submit = self._leases.submit
        started = now_s()
        while True:
            try:
                answers = submit(self.client_id, op), submit(self.client_id, operations.BALANCE)
                answer, looked = await asyncio.gather(*answers)
                break
            except Unreachable:
                await asyncio.sleep(RETRY_PAUSE_S)
        balance = parse_balance(looked.decode())
        is_same = balance.open and balance.generation == self.generation
        self._granted, self._available, self._is_open = balance.granted, balance.available, balance.open
        self.generation = balance.generation
        if answer.startswith(b"g "):
            self.deadline = max(self.deadline, started + ttl_s)
            # A new generation takes a lease as it is stated: no credits may come that were not here.
            if is_same or not is_raise:
                self.free += int(answer.rpartition(b" ")[2]) - self._stands_for()
            return True
        if answer == b"o":
            # Done before, and its answer was lost: what it gave is not known, so nothing is counted on.
            self._is_woken = True
            return True
        if answer != b"l":
            log.error("a lease's statement was refused", client_id=self.client_id, answer=answer.decode())
        return False

    def _target(self) -> int:
        """How much shall be free: the demand, within the share of the budget and what others need to find."""
        now = now_s()
        if self._spent or self._missed:
            self._used_at = now
        self._share = int(self._granted * self._plan.share_max)
        if self._missed or SPENT_SHARE * self._spent > self._size:
            self._size = min(max(2 * self._size, self._size + 2 * self._missed), self._share)
        GRANTED.inc(self._takes)
        self._spent = self._missed = self._takes = 0
        room = (self._available + self.free) // ROOM_SHARE
        if not self._is_open:
            room = max(room, self.free)
        elif min(room, self._share) < SMALL * self._request:
            self._leases.cool(self.client_id)
            self.retire()
        if now > self._retire_at or now - self._used_at > self._plan.ttl_s:
            self.retire()
        if self.is_retired:
            return 0
        return max(0, min(self._size, room, self._share - self.decided - self.unstated))

    def _is_over(self) -> bool:
        if not self.is_retired or self._parts:
            return False
        if self.free > 0:
            self._is_woken = True
            return False
        return self.decided == 0 or self._leases.is_closing or now_s() > self._live_until

    async def _end(self) -> None:
        """Nothing is decided any more. What nobody ended stays held until the log's clock ends it."""
        if self.decided == 0:
            with suppress(Unreachable):
                await self._leases.submit(
                    self.client_id, operations.settle(self.reservation_id, (), final=True)
                )

    def _lapse(self) -> None:
        """From now on each reservation made here stands for itself; unstated parts are still told."""
        self.free = 0
        self.is_retired = True
        self._leases.forget(self)
        self._leases.release(self)
        while self._parts:
            parts, self._parts = self._parts[:STATEMENT_PARTS_MAX], self._parts[STATEMENT_PARTS_MAX:]
            op = operations.lease(self.reservation_id, 1, 0, parts, ttl_ms=1, generation=self.generation)
            with suppress(Unreachable):
                self._leases.submit(self.client_id, op).add_done_callback(_seen)
        for waiting in (self._returned, self._room, self._refilled):
            if waiting is not None and not waiting.done():
                waiting.set_result(None)


class Ended:
    """The newest ended reservations and their clients; the oldest are forgotten."""

    def __init__(self) -> None:
        self.newer: dict[str, str] = {}
        self.older: dict[str, str] = {}

    def note(self, reservation_id: str, client_id: str) -> None:
        """One more."""
        self.newer[reservation_id] = client_id
        self.trim()

    def trim(self) -> None:
        """Forget the oldest, if there are too many."""
        if len(self.newer) >= ENDED_MAX:
            self.older, self.newer = self.newer, {}

    def client_of(self, reservation_id: str) -> str | None:
        """None: not known."""
        return self.newer.get(reservation_id) or self.older.get(reservation_id)


class Leases:
    """All leases of one process.

    Attributes:
        active: by client; what is decided from.
        held: reservations that were decided here: the lease, and the micro-credits they still hold.
        partly: reservations settled in part: what they held at first, and the positions named.
        opening: by client; done when there is a lease, or none can be had.
    """

    def __init__(
        self, submit: Submit, plan: LeasePlan, known: dict[str, Reservation], settled: Ended, voided: Ended
    ) -> None:
        """None is open yet.

        Args:
            submit: sends an operation of a client.
            plan: when and how.
            known: reservations made at the server.
            settled: noted here, too.
            voided: noted here, too.
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
        self.partly: dict[str, tuple[int, set[tuple[str, int, int]]]] = {}
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
                    f"reservation {reservation_id!r} of {lease.client_id} holds {credits_of(whole):f} credits, "
                    f"{client_id} asked for {credits_of(micro):f}"
                )
            return Reservation(
                reservation_id, client_id, micro, ttl_s, lease.generation, done=False, covered=True
            )
        if self.voided.client_of(reservation_id) == client_id:
            raise ReservationLapsed(client_id, reservation_id)
        if self.settled.client_of(reservation_id) == client_id:
            return Reservation(reservation_id, client_id, micro, ttl_s, 0, done=True, covered=True)
        return None

    def again_or_why_not(
        self, client_id: str, reservation_id: str, micro: int, ttl_s: float
    ) -> Outcome | None:
        """`again`; what it raises is the outcome."""
        try:
            return self.again(client_id, reservation_id, micro, ttl_s)
        except (ReservationConflict, ReservationLapsed) as error:
            return error

    def new_parts(
        self, reservation_id: str, left: int, parts: Sequence[Part], *, final: bool
    ) -> Sequence[Part]:
        """Those that earlier calls of a reservation have not named: a repeated one frees nothing."""
        if final:
            _, named = self.partly.pop(reservation_id, (left, set()))
        else:
            _, named = self.partly.setdefault(reservation_id, (left, set()))
        new = [part for part in parts if part[:3] not in named]
        named.update(part[:3] for part in new)
        return new

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
            whole, _ = self.partly.pop(reservation_id, (left, None))
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


def _seen(answered: asyncio.Future[bytes]) -> None:
    """Nobody waits for it; an error was logged where it arose."""
    if not answered.cancelled():
        answered.exception()
