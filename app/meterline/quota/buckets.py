"""`CreditBuckets`: reserve before the work, settle after it; asyncio and plain threads, in the same words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Protocol

from meterline import metrics
from meterline.domain.buckets import parse_balance
from meterline.domain.clients import QuotaPolicy
from meterline.quota import operations
from meterline.quota.answers import (
    Balance,
    Credits,
    Outcome,
    Part,
    Reservation,
    credits_of,
    id_checked,
    is_plain,
    micro_of,
    parts_checked,
    settled_checked,
    ttl_ms_of,
    wanted_checked,
)
from meterline.quota.availability import Availability, Unreachable
from meterline.quota.batching import Batcher
from meterline.quota.errors import (
    CreditsExhausted,
    InvalidReservation,
    QuotaUnavailable,
    ReservationConflict,
    ReservationLapsed,
)
from meterline.quota.leases import LeasePlan, Leases
from meterline.quota.loop_thread import LoopThread
from meterline.quota.reservations import Held, Reservations
from meterline.quota.routes import Routes
from meterline.quota.server import Server
from meterline.quota.sync import SyncCreditBuckets

__all__ = ["Carrier", "Connecting", "CreditBuckets", "Policy", "deny"]

CONNECT_S_MIN: Final = 2.0
"""The first connection may take longer than a decision: names are looked up, certificates exchanged."""
LEASES_CLOSE_S: Final = 2.0
"""Giving leases back takes two calls each. Beyond it the log's clock ends them."""
GENERATION_MAX: Final = 2**53 - 1
"""Newer than any: under it a bucket makes no hold anew."""

GRANTED, EXHAUSTED, ALLOWED, UNAVAILABLE = (
    metrics.QUOTA_DECISIONS.labels(outcome) for outcome in ("granted", "exhausted", "allowed", "unavailable")
)

Policy = Callable[[str], QuotaPolicy]


class Route(Protocol):
    """What brings operations to one server's buckets: `Batcher`, or the fake's memory."""

    availability: Availability

    def submit(self, client_id: str, op: operations.Op) -> asyncio.Future[bytes]:
        """See `Batcher.submit`."""

    def submit_first(self, client_id: str, op: operations.Op) -> asyncio.Future[bytes]:
        """See `Batcher.submit_first`."""


class Carrier(Protocol):
    """Who knows the way to each bucket: `Routes`, or the fake's memory."""

    def route(self, client_id: str) -> Route:
        """The one to the server that has the client's bucket."""

    async def close(self) -> None:
        """Let what is on its way arrive."""


def deny(client_id: str) -> QuotaPolicy:  # noqa: ARG001 - the same for all clients
    """The policy of who has none: no work without credits."""
    return QuotaPolicy.DENY


class CreditBuckets:
    """The credit buckets of all clients.

        async with CreditBuckets.connect(redis_url) as buckets:
            await buckets.reserve("acme", Decimal("17.25"), reservation_id="task-1/1")
            ...                                             # the work; publish what it used
            await buckets.settle("task-1/1", [Part(topic_id, partition, offset, credits_micro)])

    With plain `with`, `connect` gives the same calls for threads (`SyncCreditBuckets`).

    Every call may be repeated with the same arguments, and may be cancelled; what a cancelled call did stays
    done, so void what a cancelled `reserve` may have set aside.
    """

    def __init__(self, carrier: Carrier, policy: Policy, plan: LeasePlan | None) -> None:
        """See `connect`."""
        self._carrier = carrier
        self._route = carrier.route
        self._policy = policy
        self._reservations = Reservations()
        self._leases = Leases(self._submit_first, plan, self._reservations) if plan is not None else None

    @classmethod
    def connect(
        cls,
        redis_url: str,
        *,
        namespace: str = "meterline",
        timeout_ms: int = 250,
        batch_window_us: int = 500,
        policy: Policy = deny,
        leases: LeasePlan | None = None,
        connections: int = 4,
        batch_ops_max: int = 256,
    ) -> Connecting:
        """To be entered with `async with` or `with`.

        Redis need not be there: until it answers, the policy decides.

        Args:
            redis_url: `redis://`, `rediss://` or `unix://`; of a Redis Cluster any of its servers.
            namespace: first part of every key.
            timeout_ms: how long a call may take; then the client's policy decides.
            batch_window_us: concurrent calls are collected at most so long.
            policy: whether a client's work may be done while nobody can decide.
            leases: for very hot clients: their credits are taken in portions and decided in this process.
            connections: batches that may be on their way to a server at once: with fewer than three, it and
                this process wait for each other.
            batch_ops_max: calls in one batch: Redis does nothing else meanwhile, about 5 us each.

        Raises (when entered):
            UserError: the address is wrong, the password is refused, or the server can't keep credits safely.
        """

        async def open_buckets() -> CreditBuckets:
            look_s = max(timeout_ms / 1_000, CONNECT_S_MIN)
            server = Server.from_url(redis_url, namespace, connect_timeout_s=look_s)

            def make_batcher(one: Server, moved: Callable[[], None]) -> Batcher:
                return Batcher(
                    one,
                    window_s=batch_window_us / 1_000_000,
                    timeout_s=timeout_ms / 1_000,
                    lanes=connections,
                    batch_ops_max=batch_ops_max,
                    moved=moved,
                )

            routes = Routes(server, make_batcher, timeout_s=look_s)
            try:
                await routes.look()
            except BaseException:  # cancelled, too: no socket stays open
                await routes.close()
                raise
            return cls(routes, policy, leases)

        return Connecting(open_buckets)

    async def reserve(
        self,
        client_id: str,
        credits: Credits,  # noqa: A002 - the word everybody uses
        *,
        reservation_id: str,
        ttl_s: float = 60.0,
    ) -> Reservation:
        """Set credits aside for one piece of work.

        Args:
            client_id: whose credits.
            credits: the most the work may cost.
            reservation_id: of this attempt of the task: another attempt is another id.
            ttl_s: how long they stay set aside without `renew`.

        Returns:
            Look at `done` (the same work was settled before: don't do it again) and `covered`.

        Raises:
            CreditsExhausted: the client has too few.
            QuotaUnavailable: nobody decided in time, and the client's policy is to deny then.
            ReservationConflict: the id is taken by a reservation of other credits.
            ReservationLapsed: the reservation of this id was voided or has expired.
            InvalidReservation: what was given can never be accepted.
        """
        micro = micro_of(credits)
        leases = self._leases
        if leases is not None:
            lease = leases.active.get(client_id)
            if lease is None:
                leases.note(client_id, micro)
            else:
                if leases.turn_is_long():
                    await asyncio.sleep(0)
                made = lease.take(reservation_id, micro, ttl_s)
                if made is not None:
                    return made
                await lease.refill()
                made = lease.take(reservation_id, micro, ttl_s)
                if made is not None:
                    return made
        outcome = await self._reserve_at_server(client_id, micro, reservation_id, ttl_s)
        if isinstance(outcome, Reservation):
            return outcome
        raise outcome

    async def settle(
        self, reservation_id: str, parts: Iterable[Part], *, final: bool = True, client_id: str | None = None
    ) -> None:
        """Tell what the work has published. The log charges it; this frees what was set aside for it.

        Args:
            reservation_id: as reserved.
            parts: position and cost of each acknowledged event, in one call or several.
            final: nothing else will come; what was reserved beyond the parts is available again.
            client_id: needed when this process did not make the reservation.

        Raises:
            QuotaUnavailable: not recorded (or not known to be); the log charges nevertheless.
            InvalidReservation: what was given can never be accepted.
        """
        named = parts_checked(parts)
        held = self._reservations.find(reservation_id)
        if isinstance(held, Held):
            held.lease.settle(reservation_id, held.left, named, final=final)
            return
        owner = self._client_of(reservation_id, client_id)
        named = self._reservations.not_told(reservation_id, named)
        op = operations.settle(reservation_id, named, final=final)
        self._require_ok(await self._ask(owner, op))
        if final:
            self._reservations.settled(reservation_id, owner)

    async def void(self, reservation_id: str, *, client_id: str | None = None) -> None:
        """Free a reservation whose work did not happen. Never after an attempt to publish: settle then.

        Raises:
            QuotaUnavailable: not recorded (or not known to be): it stays set aside until its time is up.
        """
        held = self._reservations.find(reservation_id)
        if isinstance(held, Held):
            held.lease.void(reservation_id, held.left)
            return
        owner = self._client_of(reservation_id, client_id)
        self._require_ok(await self._ask(owner, operations.void(reservation_id)))
        self._reservations.voided(reservation_id, owner)

    async def renew(self, reservation_id: str, ttl_s: float = 60.0, *, client_id: str | None = None) -> None:
        """Keep credits set aside for `ttl_s` from now; call it while the work runs, three times a `ttl_s`.

        A reservation that a rebuilt bucket does not know, or that a policy allowed, is set aside by this.

        Raises:
            ReservationLapsed: it has ended: what the work costs from here on is not covered.
            QuotaUnavailable: not prolonged (or not known to be).
        """
        ttl_ms = ttl_ms_of(ttl_s)
        entry = self._reservations.find(reservation_id)
        if isinstance(entry, Held):
            try:
                entry.lease.renew(ttl_s)
            except Unreachable as error:
                raise QuotaUnavailable(str(error)) from None
            return
        owner = self._client_of(reservation_id, client_id)
        known = entry if isinstance(entry, Reservation) else None
        # Of a reservation made elsewhere the amount is not known: prolonged if it stands, not made anew.
        micro, generation = (known.credits_micro, known.generation) if known else (0, GENERATION_MAX)
        answer = await self._ask(owner, operations.renew(reservation_id, micro, ttl_ms, generation))
        if answer.startswith(b"g "):
            if known is not None:
                generation = int(answer.rpartition(b" ")[2])
                self._reservations.stand(reservation_id, known._replace(generation=generation, covered=True))
        elif answer == b"l":
            raise ReservationLapsed(owner, reservation_id)
        else:
            raise InvalidReservation(_said(answer))

    async def balance(self, client_id: str) -> Balance:
        """A client's credits at this instant, as the bucket has them: leases count as reserved.

        Raises:
            QuotaUnavailable: Redis did not answer in time.
        """
        answer = await self._ask(id_checked("client_id", client_id), operations.BALANCE)
        found = parse_balance(answer.decode())
        return Balance(
            client_id=client_id,
            granted_micro=found.granted,
            consumed_micro=found.consumed,
            provisional_micro=found.provisional,
            reserved_micro=found.reserved,
            available_micro=found.available,
            is_open=found.open,
            generation=found.generation,
            period_start=found.period_start,
        )

    async def reserve_many(
        self, client_id: str, wanted: Mapping[str, Credits], ttl_s: float = 60.0
    ) -> dict[str, Outcome]:
        """`reserve` for many pieces of work of one client in one call; each is decided by itself.

        Args:
            client_id: whose credits.
            wanted: credits by reservation id.
            ttl_s: of each.

        Returns:
            What is not simply reserved, by its id: the exception `reserve` would have raised, or a
            reservation that is `done` or not `covered`. Empty: all of the work may begin.

        Raises:
            InvalidReservation: one of them can never be accepted. None was made.
        """
        names, amounts = wanted_checked(wanted)
        leases = self._leases
        lease = None
        if leases is not None and names:
            lease = leases.active.get(client_id)
            if lease is None:
                leases.note(client_id, amounts[0], len(names))
                if opening := leases.opening.get(client_id):
                    await asyncio.shield(opening)
                    lease = leases.active.get(client_id)
        if leases is None or lease is None:
            return await self._reserve_all_at_server(client_id, names, amounts, ttl_s)
        if leases.turn_is_long():
            await asyncio.sleep(0)
        others, left = _parted(lease.take_many(names, amounts, ttl_s))
        if left:
            micros = dict(zip(names, amounts, strict=True))
            await lease.refill()
            more, left = _parted(lease.take_many(tuple(left), [micros[name] for name in left], ttl_s))
            others |= more
            others |= await self._reserve_all_at_server(
                client_id, left, [micros[name] for name in left], ttl_s
            )
        return others

    async def settle_many(
        self, client_id: str, settled: Mapping[str, Sequence[Part]], *, final: bool = True
    ) -> None:
        """`settle` for many pieces of work of one client in one call: parts by reservation id.

        Fastest with one part each, all of one source partition, for the ids of one `reserve_many` in order.

        Raises:
            QuotaUnavailable: some were not recorded (or not known to be); the same call again is safe.
            InvalidReservation: one of them can never be accepted.
        """
        columns = settled_checked(settled)
        names = tuple(settled)
        rest: Sequence[str] = names
        lease = self._leases.active.get(client_id) if self._leases is not None else None
        if final and columns is not None and lease is not None:
            rest = [names[place] for place in lease.settle_many(names, columns)]
        calls = [self.settle(name, settled[name], final=final, client_id=client_id) for name in rest]
        if not calls:
            return
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def close(self) -> None:
        """Give leases back, let calls under way end. `async with` does it."""
        if self._leases is not None:
            await self._leases.close(LEASES_CLOSE_S)
        await self._carrier.close()

    # ------------------------------------------------------------------ inside

    async def _reserve_at_server(
        self, client_id: str, micro: int, reservation_id: str, ttl_s: float
    ) -> Outcome:
        """Ask the bucket."""
        sent = self._sent(client_id, micro, reservation_id, ttl_s)
        if not isinstance(sent, asyncio.Future):
            return sent
        try:
            answer = await sent
            lease = self._leases.active.get(client_id) if self._leases is not None else None
            if answer.startswith(b"r ") and lease is not None and lease.free + int(answer[2:]) >= micro:
                # What this process keeps for itself would be enough.
                await lease.give_back()
                op = operations.reserve(reservation_id, micro, ttl_ms_of(ttl_s))
                answer = await self._route(client_id).submit(client_id, op)
        except Unreachable as error:
            return self._undecided(client_id, micro, reservation_id, ttl_s, str(error))
        return self._decided(answer, client_id, micro, reservation_id, ttl_s)

    async def _reserve_all_at_server(
        self, client_id: str, names: Sequence[str], amounts: Sequence[int], ttl_s: float
    ) -> dict[str, Outcome]:
        """What is not simply reserved."""
        waiting = [
            self._sent(client_id, micro, reservation_id, ttl_s)
            for reservation_id, micro in zip(names, amounts, strict=True)
        ]
        outcomes: dict[str, Outcome] = {}
        for reservation_id, micro, answer in zip(names, amounts, waiting, strict=True):
            if not isinstance(answer, asyncio.Future):
                outcomes[reservation_id] = answer
                continue
            try:
                outcome = self._decided(await answer, client_id, micro, reservation_id, ttl_s)
            except Unreachable as error:
                outcome = self._undecided(client_id, micro, reservation_id, ttl_s, str(error))
            outcomes[reservation_id] = outcome
        return {name: outcome for name, outcome in outcomes.items() if not is_plain(outcome)}

    def _sent(
        self, client_id: str, micro: int, reservation_id: str, ttl_s: float
    ) -> asyncio.Future[bytes] | Outcome:
        """The server's answer to come; or the outcome, where it can't or needn't be asked."""
        try:
            self._require_own(client_id, reservation_id)
            ttl_ms = ttl_ms_of(ttl_s)
            if self._leases is not None and (
                again := self._reservations.again(client_id, reservation_id, micro, ttl_s)
            ):
                return again
        except (ReservationConflict, ReservationLapsed, InvalidReservation) as error:
            return error
        route = self._route(client_id)
        if route.availability.tripped:
            return self._undecided(client_id, micro, reservation_id, ttl_s, route.availability.reason)
        try:
            return route.submit(client_id, operations.reserve(reservation_id, micro, ttl_ms))
        except Unreachable as error:
            return self._undecided(client_id, micro, reservation_id, ttl_s, str(error))

    def _decided(  # noqa: PLR0911 - one for each word a bucket answers
        self, answer: bytes, client_id: str, micro: int, reservation_id: str, ttl_s: float
    ) -> Outcome:
        """What the bucket's answer means."""
        kind, _, rest = answer.partition(b" ")
        if kind == b"g":
            GRANTED.inc()
            generation = int(rest.partition(b" ")[2])
            made = Reservation(reservation_id, client_id, micro, ttl_s, generation, done=False, covered=True)
            self._reservations.stand(reservation_id, made)
            return made
        match kind:
            case b"r":
                EXHAUSTED.inc()
                return CreditsExhausted(client_id, credits_of(micro), credits_of(int(rest)))
            case b"c":
                return self._undecided(
                    client_id, micro, reservation_id, ttl_s, "the buckets are being rebuilt"
                )
            case b"d":
                self._reservations.settled(reservation_id, client_id)
                return Reservation(reservation_id, client_id, micro, ttl_s, 0, done=True, covered=True)
            case b"t":
                return ReservationLapsed(client_id, reservation_id)
            case b"x":
                return ReservationConflict(
                    f"reservation {reservation_id!r} of {client_id} holds {credits_of(int(rest)):f} credits; "
                    f"{credits_of(micro):f} were asked for under the same id"
                )
            case _:
                return InvalidReservation(_said(answer))

    def _undecided(
        self, client_id: str, micro: int, reservation_id: str, ttl_s: float, reason: str
    ) -> Reservation | QuotaUnavailable:
        """The client's policy decides."""
        if self._policy(client_id) is not QuotaPolicy.ALLOW:
            UNAVAILABLE.inc()
            return QuotaUnavailable(f"credits of {client_id} could not be reserved: {reason}")
        ALLOWED.inc()
        self._route(client_id).availability.allowed(micro)
        made = Reservation(reservation_id, client_id, micro, ttl_s, 0, done=False, covered=False)
        self._reservations.stand(reservation_id, made)
        return made

    def _require_own(self, client_id: str, reservation_id: str) -> None:
        """Ids are the bucket's, but settle and void name no client: one process uses an id for one client."""
        known = self._reservations.find(reservation_id)
        if not isinstance(known, Reservation):
            id_checked("client_id", client_id)
            id_checked("reservation_id", reservation_id)
        elif known.client_id != client_id:
            raise ReservationConflict(
                f"reservation {reservation_id!r} is one of {known.client_id}, not of {client_id}"
            )

    def _client_of(self, reservation_id: str, client_id: str | None) -> str:
        if client_id is not None:
            id_checked("reservation_id", reservation_id)
            return id_checked("client_id", client_id)
        found = self._reservations.client_of(reservation_id)
        if found is None:
            raise InvalidReservation(
                f"reservation {reservation_id!r} is not known in this process: name its client_id"
            )
        return found

    async def _ask(self, client_id: str, op: operations.Op) -> bytes:
        route = self._route(client_id)
        if route.availability.tripped:
            raise QuotaUnavailable(route.availability.reason)
        try:
            return await route.submit(client_id, op)
        except Unreachable as error:
            raise QuotaUnavailable(str(error)) from None

    def _submit_first(self, client_id: str, op: operations.Op) -> asyncio.Future[bytes]:
        return self._route(client_id).submit_first(client_id, op)

    def _require_ok(self, answer: bytes) -> None:
        if answer.startswith(b"e "):
            raise InvalidReservation(_said(answer))


class Connecting:
    """`async with` it for `CreditBuckets`, `with` it for `SyncCreditBuckets`."""

    def __init__(self, open_buckets: Callable[[], Coroutine[Any, Any, CreditBuckets]]) -> None:
        """See `CreditBuckets.connect`."""
        self._open = open_buckets
        self._buckets: CreditBuckets | None = None
        self._thread: LoopThread | None = None

    async def __aenter__(self) -> CreditBuckets:
        self._buckets = await self._open()
        return self._buckets

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._buckets is not None:
            await self._buckets.close()

    def __enter__(self) -> SyncCreditBuckets:
        self._thread = LoopThread("CreditBuckets")
        try:
            self._buckets = self._thread.run(self._open())
        except BaseException:  # Ctrl-C, too: no thread stays behind
            self._thread.stop()
            raise
        return SyncCreditBuckets(self._buckets, self._thread.run)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None and self._buckets is not None:
            self._thread.run(self._buckets.close())
            self._thread.stop()


def _parted(outcomes: dict[str, Outcome | None]) -> tuple[dict[str, Outcome], list[str]]:
    """What a lease decided, and the ids it could not decide."""
    return (
        {name: outcome for name, outcome in outcomes.items() if outcome is not None},
        [name for name, outcome in outcomes.items() if outcome is None],
    )


def _said(answer: bytes) -> str:
    """The bucket's own words for a refusal."""
    return answer.decode().removeprefix("e ")
