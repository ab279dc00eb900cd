"""What a process knows of reservations, by id: those that stand, and the newest that ended.

One dictionary, because an id must be looked for wherever it may be, and each look into a large dictionary
waits for memory: on the hottest path that is most of what a decision costs. Those of a bulk call share one
entry, `Bulk`, as long as they have one fate: settled together, they are not looked at one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from meterline.quota.answers import Part, Reservation, credits_of
from meterline.quota.errors import ReservationConflict, ReservationLapsed

if TYPE_CHECKING:
    from meterline.quota.lease import Lease

__all__ = ["Bulk", "Held", "Reservations"]

ENDED_MAX: Final = 100_000
"""Ended reservations remembered, to recognise a repeated call; the oldest are forgotten."""
STANDING_MAX: Final = 1_000_000
"""Reservations that stand whose client is remembered for settle, void and renew: a process runs fewer tasks.
Beyond it the oldest are forgotten, which only means that `client_id` must be named for them."""
ENTRIES_MAX: Final = STANDING_MAX + ENDED_MAX

Position = tuple[str, int, int]
"""Topic id, partition and offset: an event."""


class Held(NamedTuple):
    """Decided under a lease of this process; `left` micro-credits are set aside."""

    lease: Lease
    left: int


class Column:
    """Positions of one source partition: those of a bulk call share one."""

    __slots__ = ("_offsets", "_source")

    def __init__(self, source: tuple[str, int], offsets: Sequence[int]) -> None:
        """Topic id and partition; offsets."""
        self._source = source
        self._offsets: Container[int] = offsets

    def __contains__(self, position: object) -> bool:
        """Whether it is one of them."""
        if isinstance(self._offsets, Sequence):  # made a set when it is first asked, which it hardly ever is
            self._offsets = frozenset(self._offsets)
        return isinstance(position, tuple) and position[:2] == self._source and position[2] in self._offsets


class Bulk:
    """Reservations of one bulk call, the entry of each of them while all stand as made, or all are settled.

    Attributes:
        lease: they were decided under; None: they are settled.
        names: their ids, in the order of the call.
        amounts: micro-credits set aside for each, while they stand.
        settled: what would be the entry of each of them, once they are.
    """

    __slots__ = ("amounts", "lease", "names", "settled")

    def __init__(self, lease: Lease, names: tuple[str, ...], amounts: Sequence[int]) -> None:
        """They stand."""
        self.lease: Lease | None = lease
        self.names = names
        self.amounts = amounts
        self.settled: Settled | None = None


class Voided(NamedTuple):
    """Ended, and nothing was used."""

    client_id: str


Settled = tuple[str, Container[Position] | None]
"""Ended, and done: the client, and the positions that a lease told the bucket of, in a sum (None: the bucket
itself knows them). A plain tuple, and the only one here: Python's garbage collector leaves those of text and
numbers alone, and there are a hundred thousand."""

Entry = Held | Reservation | Settled | Voided
"""A `Reservation` was made at the server, or its lease is gone."""

OVER: Final = frozenset({tuple, Voided})
"""Types of entries that ended."""


class Reservations:
    """All that one process knows.

    Attributes:
        entries: by reservation id, to see whether it was ever used. `find` gives what is there.
        partly: of those settled in part: what they held at first, and the positions named.
    """

    def __init__(self) -> None:
        """None is known yet."""
        self.entries: dict[str, Entry | Bulk] = {}
        self.partly: dict[str, tuple[int, set[Position]]] = {}
        self._ended = 0
        self._over: deque[str | Bulk] = deque()
        """What ended, the oldest first: all that did, and some that stand again or are forgotten."""

    def find(self, reservation_id: str) -> Entry | None:
        """What is known of an id. If it is one of a bulk call, each of them has its own entry from now on."""
        entry = self.entries.get(reservation_id)
        if not isinstance(entry, Bulk):
            return entry
        self._part(entry)
        return self.find(reservation_id)

    def stand(self, reservation_id: str, entry: Held | Reservation) -> None:
        """A reservation was made, or changed."""
        entries = self.entries
        if reservation_id in entries and type(self.find(reservation_id)) in OVER:
            self._ended -= 1  # its id was forgotten by the bucket, not here
        entries[reservation_id] = entry
        if len(entries) > ENTRIES_MAX:
            self._forget(next(iter(entries)))

    def again(self, client_id: str, reservation_id: str, micro: int, ttl_s: float) -> Reservation | None:
        """A reservation whose id was used in this process.

        Returns:
            The same once more, perhaps `done`; None: the server knows.

        Raises:
            ReservationConflict: other credits, or another client.
            ReservationLapsed: it was voided.
        """
        entry = self.find(reservation_id)
        if isinstance(entry, Held):
            lease, left = entry
            whole, _ = self.partly.get(reservation_id, (left, None))
            if lease.client_id != client_id or whole != micro:
                raise ReservationConflict(
                    f"{reservation_id!r} of {lease.client_id} holds {credits_of(whole):f} credits; "
                    f"{client_id} asked for {credits_of(micro):f}"
                )
            return Reservation(
                reservation_id, client_id, micro, ttl_s, lease.generation, done=False, covered=True
            )
        if entry is None or self.client_of(reservation_id) != client_id:
            return None
        if isinstance(entry, Voided):
            raise ReservationLapsed(client_id, reservation_id)
        if not isinstance(entry, Reservation):
            return Reservation(reservation_id, client_id, micro, ttl_s, 0, done=True, covered=True)
        return None

    def client_of(self, reservation_id: str) -> str | None:
        """Whose reservation it is; None: not known."""
        entry = self.find(reservation_id)
        if isinstance(entry, Held):
            return entry.lease.client_id
        if isinstance(entry, Reservation | Voided):
            return entry.client_id
        return entry[0] if entry is not None else None

    def hold_new(self, names: tuple[str, ...], amounts: Sequence[int], lease: Lease) -> bool:
        """Reservations of different ids decided under a lease, if none of the ids was ever used.

        Returns:
            Whether they stand now: all, or none.
        """
        entries = self.entries
        if not entries.keys().isdisjoint(names) or len(entries) + len(names) > ENTRIES_MAX:
            return False
        # One object for all, not for each id: the garbage collector looks at every one of them.
        entries.update(dict.fromkeys(names, Bulk(lease, names, amounts)))
        return True

    def bulk_of(self, lease: Lease, names: tuple[str, ...]) -> Bulk | None:
        """The bulk call that made just these reservations, all of which the lease holds as made."""
        bulk = self.entries.get(names[0])
        if isinstance(bulk, Bulk) and bulk.lease is lease and bulk.names == names:
            return bulk
        return None

    def held_by(self, lease: Lease, names: Sequence[str]) -> dict[int, int]:
        """What is set aside for those of different ids that a lease holds, not settled in part, by place."""
        held = {}
        for place, name in enumerate(names):
            entry = self.find(name)
            if isinstance(entry, Held) and entry.lease is lease and name not in self.partly:
                held[place] = entry.left
        return held

    def settled_all(
        self, names: Sequence[str], client_id: str, source: tuple[str, int], offsets: Sequence[int]
    ) -> None:
        """Reservations held under a lease ended, each with one event of one source partition."""
        self.entries.update(dict.fromkeys(names, (client_id, Column(source, offsets))))
        self._over.extend(names)
        self._ended += len(names)
        self._forget_oldest()

    def settled_bulk(
        self, bulk: Bulk, client_id: str, source: tuple[str, int], offsets: Sequence[int]
    ) -> None:
        """`settled_all` for those of a bulk call that stands."""
        bulk.settled = (client_id, Column(source, offsets))
        bulk.lease, bulk.amounts = None, ()
        self._over.append(bulk)
        self._ended += len(bulk.names)
        self._forget_oldest()

    def settled(self, reservation_id: str, client_id: str, told: Container[Position] | None = None) -> None:
        """A reservation ended, and is done; `told`: if a lease names them, all positions of this call."""
        before = self._told(reservation_id)
        self.partly.pop(reservation_id, None)
        self._end(reservation_id, (client_id, told if before is None else before))

    def voided(self, reservation_id: str, client_id: str) -> None:
        """A reservation ended without any use; if it had some, it is settled."""
        if type(self.find(reservation_id)) is tuple or reservation_id in self.partly:
            self.settled(reservation_id, client_id)
        else:
            self._end(reservation_id, Voided(client_id))

    def new_parts(self, reservation_id: str, left: int, parts: Sequence[Part]) -> Sequence[Part]:
        """Those that earlier calls of a reservation have not named: a repeated one frees nothing."""
        _, named = self.partly.setdefault(reservation_id, (left, set()))
        new = [part for part in parts if part[:3] not in named]
        named.update(part[:3] for part in new)
        return new

    def not_told(self, reservation_id: str, parts: Sequence[Part]) -> Sequence[Part]:
        """Those that no lease has told the bucket: in a sum it can't know them again, it would count them."""
        told = self._told(reservation_id)
        if told is None:
            return parts
        return [part for part in parts if part[:3] not in told]

    def release(self, lease: Lease, ttl_s: float) -> None:
        """What a lease held goes on by itself: its settle and renew go to the server."""
        held = [
            rid
            for rid, entry in self.entries.items()
            if isinstance(entry, Held | Bulk) and entry.lease is lease
        ]
        for reservation_id, entry in zip(held, map(self.find, held), strict=True):
            left = entry.left if isinstance(entry, Held) else 0
            whole, _ = self.partly.get(reservation_id, (left, None))
            self.entries[reservation_id] = Reservation(
                reservation_id, lease.client_id, whole, ttl_s, lease.generation, done=False, covered=True
            )

    def holders(self) -> set[Lease]:
        """Leases under which something stands."""
        return {
            entry.lease
            for entry in self.entries.values()
            if isinstance(entry, Held | Bulk) and entry.lease is not None
        }

    def _told(self, reservation_id: str) -> Container[Position] | None:
        entry = self.find(reservation_id)
        if entry is None or isinstance(entry, Held | Reservation | Voided):
            return self.partly.get(reservation_id, (0, None))[1]
        return entry[1]

    def _part(self, bulk: Bulk) -> None:
        """Those of a bulk call no longer have one fate: each gets an entry of its own."""
        names, bulk.names = bulk.names, ()
        if bulk.settled is not None:
            self.entries.update(dict.fromkeys(names, bulk.settled))
            self._over.extend(names)
        elif bulk.lease is not None:
            held = {micro: Held(bulk.lease, micro) for micro in set(bulk.amounts)}
            self.entries.update(zip(names, map(held.__getitem__, bulk.amounts), strict=True))

    def _end(self, reservation_id: str, entry: Settled | Voided) -> None:
        """It has an entry of its own, or none: who ends it has looked."""
        known = self.entries.get(reservation_id)
        self.entries[reservation_id] = entry
        if type(known) not in OVER:
            self._over.append(reservation_id)
            self._ended += 1
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        while self._ended > ENDED_MAX or len(self._over) > ENDED_MAX:
            oldest = self._over.popleft()
            if isinstance(oldest, Bulk):
                deque(map(self.entries.pop, oldest.names), maxlen=0)
                self._ended -= len(oldest.names)
            elif (entry := self.entries.pop(oldest, None)) is not None:
                if type(entry) in OVER:
                    self._ended -= 1
                else:  # it stands again
                    self.entries[oldest] = entry

    def _forget(self, reservation_id: str) -> None:
        if type(self.find(reservation_id)) in OVER:
            self._ended -= 1
        del self.entries[reservation_id]
