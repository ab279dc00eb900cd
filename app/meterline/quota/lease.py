"""A lease: a very hot client's credits are taken in portions, and decided in this process.

A lease is a reservation whose holder is this process. The holder states it anew with numbered messages, each
of which says everything: how much it still needs, and which parts were settled since the last one. The rules
(the model's Q7), and what each prevents:

* A statement is absolute, has a number, and one at a time is on its way, repeated unchanged until it is
  answered: a copy that arrives late or twice changes nothing.
* Parts are stated as one sum for each source partition, at the largest offset (`Unstated`): what is left of
  it is provisional until the log has got there: the bucket may count too much for a moment, never too little.
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
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from operator import gt
from typing import TYPE_CHECKING, Final

from meterline import metrics
from meterline.domain.buckets import BucketBalance, parse_balance
from meterline.quota import operations
from meterline.quota.answers import TTL_S_MAX, Outcome, Part, Reservation, SettledColumns, is_plain
from meterline.quota.availability import Unreachable
from meterline.quota.errors import ReservationConflict, ReservationLapsed
from meterline.quota.reservations import Held
from meterline.quota.unstated import Unstated

if TYPE_CHECKING:
    from meterline.quota.leases import Leases

__all__ = ["ROOM_SHARE", "SMALL", "Lease", "LeasePlan", "Submit", "now_s"]

STATEMENT_PARTS_MAX: Final = 2_000
"""Of one statement, about 6 ms of the server's time. More only where there are more partitions."""
RETRY_PAUSE_S: Final = 0.05
ROOM_SHARE: Final = 8
"""A lease takes at most this fraction of what is left, so that several processes find some."""
SMALL: Final = 4
"""A lease of fewer reservations than this is not worth its messages."""
RETIRE_AFTER_S: Final = 60.0
"""Then a lease is replaced by a new one: reservations that nobody ended can't keep an old one for ever."""

TTL_SLACK: Final = 1.25
"""A lease stands longer than its reservations were promised, so that not each new one needs a statement."""
SPENT_SHARE: Final = 4
"""A lease grows until one round of statements spends less than this fraction of it."""

GRANTED: Final = metrics.QUOTA_DECISIONS.labels("granted")
Submit = Callable[[str, operations.Op], "asyncio.Future[bytes]"]

_clock_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

log = logging.getLogger("meterline.quota")


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

    `free + decided + unstated.micro` is what the bucket holds for it, as far as this process knows.

    Attributes:
        free: can be decided; micro-credits, as all amounts here. Below zero after the bucket gave less.
        decided: reserved by work that has not ended.
        unstated: parts that were settled and that no statement has named yet.
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
        self.unstated = Unstated()
        self.deadline = deadline
        self.is_retired = False
        self._leases = leases
        self._reservations = leases.reservations
        self._plan = leases.plan
        self._loop = asyncio.get_running_loop()
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
        if reservation_id in self._reservations.entries:
            return self._reservations.again(self.client_id, reservation_id, micro, ttl_s)
        self.free -= micro
        self.decided += micro
        self._spent += micro
        self._takes += 1
        self._reservations.stand(reservation_id, Held(self, micro))
        ends = now + ttl_s
        self._live_until = max(self._live_until, ends)
        if self.free < self._low or ends > self.deadline:
            self._request = micro
            self._ttl_s = max(self._ttl_s, ttl_s)
            self.wake()
        return tuple.__new__(  # Reservation() takes twice as long
            Reservation, (reservation_id, self.client_id, micro, ttl_s, self.generation, False, True)
        )

    def take_many(
        self, names: tuple[str, ...], amounts: Sequence[int], ttl_s: float
    ) -> dict[str, Outcome | None]:
        """`take` for many.

        Where all of them are new and fit, which is nearly always, that is seen and written by whole columns,
        without a line of Python for each: it is why there is a bulk call.

        Returns:
            What is not simply reserved: `again`, a conflict; None: ask the server.
        """
        now = now_s()
        wanted = sum(amounts)
        if (
            wanted > self.free
            or now >= self.deadline
            or not self._reservations.hold_new(names, amounts, self)
        ):
            taken = (
                (name, self._take_or_why_not(name, micro, ttl_s))
                for name, micro in zip(names, amounts, strict=True)
            )
            return {name: outcome for name, outcome in taken if not is_plain(outcome)}
        self.free -= wanted
        self.decided += wanted
        self._spent += wanted
        self._takes += len(names)
        ends = now + ttl_s
        self._live_until = max(self._live_until, ends)
        if self.free < self._low or ends > self.deadline:
            self._request = wanted // max(1, len(names))
            self._ttl_s = max(self._ttl_s, ttl_s)
            self.wake()
        return {}

    def _take_or_why_not(self, reservation_id: str, micro: int, ttl_s: float) -> Outcome | None:
        try:
            return self.take(reservation_id, micro, ttl_s)
        except (ReservationConflict, ReservationLapsed) as error:
            return error

    def settle_many(self, names: tuple[str, ...], columns: SettledColumns) -> Sequence[int]:
        """`settle`, final, for many. Just those of one bulk call end as they were made, by whole columns.

        Returns:
            Which of them this lease doesn't hold as a whole, by their place.
        """
        reservations = self._reservations
        source, offsets, amounts = columns
        bulk = reservations.bulk_of(self, names)
        if bulk is not None:
            self._note_settled(bulk.amounts, columns)
            reservations.settled_bulk(bulk, self.client_id, source, offsets)
            return ()
        held = reservations.held_by(self, names)
        if held:
            offsets, amounts = [offsets[place] for place in held], [amounts[place] for place in held]
            self._note_settled(list(held.values()), SettledColumns(source, offsets, amounts))
            reservations.settled_all([names[place] for place in held], self.client_id, source, offsets)
        return [place for place in range(len(names)) if place not in held]

    def _note_settled(self, holds: Sequence[int], settled: SettledColumns) -> None:
        """The next statement names what was settled; what was held beyond it can be decided again."""
        self._state_soon()
        source, offsets, amounts = settled
        decided = sum(holds)
        used = costs = sum(amounts)
        if any(map(gt, amounts, holds)):
            used = sum(map(min, holds, amounts))
        self.unstated.add(source, max(offsets), costs, used)
        self.decided -= decided
        self.free += decided - used

    def settle(self, reservation_id: str, micro: int, parts: Sequence[Part], *, final: bool) -> None:
        """Note settled parts of a reservation that has `micro` left; the next statement names them."""
        reservations = self._reservations
        named = tuple(part[:3] for part in parts)
        if not final or reservation_id in reservations.partly:
            parts = reservations.new_parts(reservation_id, micro, parts)
        self._state_soon()
        used = min(micro, sum(part.credits_micro for part in parts))
        left = used
        for topic_id, partition, offset, cost in parts:
            held = min(left, cost)
            left -= held
            self.unstated.add((topic_id, partition), offset, cost, held)
        if final:
            reservations.settled(reservation_id, self.client_id, named)
            self.decided -= micro
            self.free += micro - used
        else:
            reservations.stand(reservation_id, Held(self, micro - used))
            self.decided -= used

    def _state_soon(self) -> None:
        """Within the interval there will be a statement."""
        if not self.unstated:
            self._loop.call_later(self._plan.interval_ms / 1_000, self.wake)

    def void(self, reservation_id: str, micro: int) -> None:
        """The credits of a reservation can be decided again."""
        self._reservations.voided(reservation_id, self.client_id)
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
        parts = self.unstated.take(STATEMENT_PARTS_MAX)
        refilled, self._refilled = self._refilled, None
        try:
            if not await self._say(self._stands_for(), parts):
                return False
            if self.is_retired:
                if self.free <= 0 and not self._returned.done():
                    self._returned.set_result(None)
            elif self.free <= target // 2 and self._is_open:
                self._low = target // 2
                hold = min(target + self.decided + self.unstated.micro, self._share)
                if hold > self._stands_for() and not await self._say(hold, ()):
                    return False
        finally:
            if refilled is not None:
                refilled.set_result(None)
        if self.unstated:
            self._is_woken = True
        return True

    def _stands_for(self) -> int:
        """What the bucket holds for this lease, as far as is known here."""
        return self.free + self.decided + self.unstated.micro

    async def _say(self, hold: int, parts: Sequence[Part]) -> bool:
        """Make one statement, the same again until it is answered; in the same call, look at the bucket.

        Returns:
            Whether the lease stands.
        """
        self._seq += 1
        is_raise = hold > self._stands_for()
        ttl_s = min(self._ttl_s * TTL_SLACK, TTL_S_MAX)
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
            log.error("a lease's statement was refused for %s: %s", self.client_id, answer.decode())
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
        return max(0, min(self._size, room, self._share - self.decided - self.unstated.micro))

    def _is_over(self) -> bool:
        if not self.is_retired or self.unstated:
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
        self._reservations.release(self, self._plan.ttl_s)
        while parts := self.unstated.take(STATEMENT_PARTS_MAX):
            op = operations.lease(self.reservation_id, 1, 0, parts, ttl_ms=1, generation=self.generation)
            with suppress(Unreachable):
                self._leases.submit(self.client_id, op).add_done_callback(_seen)
        for waiting in (self._returned, self._refilled):
            if waiting is not None and not waiting.done():
                waiting.set_result(None)


def _seen(answered: asyncio.Future[bytes]) -> None:
    """Nobody waits for it; an error was logged where it arose."""
    if not answered.cancelled():
        answered.exception()
