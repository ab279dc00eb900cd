"""What a process knows of reservations, by id: those that stand, and the newest that ended.

One dictionary, because an id must be looked for wherever it may be, and each look into a large dictionary
waits for memory: on the hottest path that is most of what a decision costs.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import islice, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from meterline.quota.answers import Part, Reservation, credits_of
from meterline.quota.errors import ReservationConflict, ReservationLapsed

if TYPE_CHECKING:
    from meterline.quota.lease import Lease

__all__ = ["Held", "Reservations"]

ENDED_MAX: Final = 100_000
"""Ended reservations remembered, to recognise a repeated call; the oldest are forgotten."""
STANDING_MAX: Final = 1_000_000
"""Reservations that stand whose client is remembered for settle, void and renew: a process runs fewer tasks.
Beyond it the oldest are forgotten, which only means that `client_id` must be named for them."""
STEP: Final = 1_024
"""Entries looked at in one go when the oldest are forgotten: a tenth of a millisecond."""

Position = tuple[str, int, int]
"""Topic id, partition and offset: an event."""


class Held(NamedTuple):
    """Decided under a lease of this process; `left` micro-credits are set aside."""

    lease: Lease
    left: int


class Column:
    """Positions of one source partition: those of a bulk call share one."""

    __slots__ = ("_offsets", "_source")

    def __init__(self, source: tuple[str, int], offsets: Iterable[int]) -> None:
        """Topic id and partition; offsets."""
        self._source = source
        self._offsets = frozenset(offsets)

    def __contains__(self, position: object) -> bool:
        """Whether it is one of them."""
        return isinstance(position, tuple) and position[:2] == self._source and position[2] in self._offsets


class Voided(NamedTuple):
    """Ended, and nothing was used."""

    client_id: str


Settled = tuple[str, Container[Position] | None]
"""Ended, and done: the client, and the positions that a lease told the bucket of, in a sum (None: the bucket
itself knows them). A plain tuple, and the only one here: Python's garbage collector leaves those of text and
numbers alone, and there are a hundred thousand."""

Entry = Held | Reservation | Settled | Voided
"""A `Reservation` was made at the server, or its lease is gone."""

NOBODYS: Final = (None,)
OVER: Final = frozenset({tuple, Voided})
"""Types of entries that ended."""

_holder, _left = itemgetter(0), itemgetter(1)


class Reservations:
    """All that one process knows.

    Attributes:
        entries: by reservation id. Read it anywhere; it is changed here.
        partly: of those settled in part: what they held at first, and the positions named.
    """

    def __init__(self) -> None:
        """None is known yet."""
        self.entries: dict[str, Entry] = {}
        self.partly: dict[str, tuple[int, set[Position]]] = {}
        self._ended = 0

    def stand(self, reservation_id: str, entry: Held | Reservation) -> None:
        """A reservation was made, or changed."""
        if type(self.entries.get(reservation_id)) in OVER:  # its id was forgotten by the bucket, not here
            self._ended -= 1
        self.entries[reservation_id] = entry
        if len(self.entries) > STANDING_MAX + ENDED_MAX:
            self._forget(next(iter(self.entries)))

    def again(self, client_id: str, reservation_id: str, micro: int, ttl_s: float) -> Reservation | None:
        """A reservation whose id was used in this process.

        Returns:
            The same once more, perhaps `done`; None: the server knows.

        Raises:
            ReservationConflict: other credits, or another client.
            ReservationLapsed: it was voided.
        """
        entry = self.entries.get(reservation_id)
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
        entry = self.entries.get(reservation_id)
        if isinstance(entry, Held):
            return entry.lease.client_id
        if isinstance(entry, Reservation | Voided):
            return entry.client_id
        return entry[0] if entry is not None else None

    def hold_new(self, names: Sequence[str], amounts: Sequence[int], lease: Lease) -> bool:
        """Reservations of different ids decided under a lease, if none of the ids was ever used.

        Returns:
            Whether they stand now: all, or none.
        """
        entries = self.entries
        if not entries.keys().isdisjoint(names):
            return False
        # One object for each amount, not for each id: the garbage collector looks at every one of them.
        held = {micro: Held(lease, micro) for micro in set(amounts)}
        entries.update(zip(names, map(held.__getitem__, amounts), strict=True))
        return True

    def held_by(self, lease: Lease, names: Sequence[str]) -> tuple[list[int], list[int]]:
        """Which of different ids a lease holds, not settled in part.

        Returns:
            What is set aside for those it does, in their order, and the places of all others.
        """
        if self.partly:
            found = [
                self.entries.get(name, NOBODYS) if name not in self.partly else NOBODYS for name in names
            ]
        else:
            found = list(map(self.entries.get, names, repeat(NOBODYS)))
        others = []
        if set(map(_holder, found)) != {lease}:
            others = [place for place, entry in enumerate(found) if entry[0] is not lease]
            found = [entry for entry in found if entry[0] is lease]
        return list(map(_left, found)), others

    def settled_all(
        self, names: Sequence[str], client_id: str, source: tuple[str, int], offsets: Iterable[int]
    ) -> None:
        """Reservations held under a lease ended, each with one event of one source partition."""
        self.entries.update(dict.fromkeys(names, (client_id, Column(source, offsets))))
        self._ended += len(names)
        self._forget_oldest()

    def settled(self, reservation_id: str, client_id: str, told: Container[Position] | None = None) -> None:
        """A reservation ended, and is done; `told`: if a lease names them, all positions of this call."""
        before = self._told(reservation_id)
        self.partly.pop(reservation_id, None)
        self._end(reservation_id, (client_id, told if before is None else before))

    def voided(self, reservation_id: str, client_id: str) -> None:
        """A reservation ended without any use; if it had some, it is settled."""
        if type(self.entries.get(reservation_id)) is tuple or reservation_id in self.partly:
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
        held = [(rid, entry) for rid, entry in self.entries.items() if entry[0] is lease]
        for reservation_id, (_, left) in held:
            whole, _ = self.partly.get(reservation_id, (left, None))
            self.entries[reservation_id] = Reservation(
                reservation_id, lease.client_id, whole, ttl_s, lease.generation, done=False, covered=True
            )

    def holders(self) -> set[Lease]:
        """Leases under which something stands."""
        return {entry.lease for entry in self.entries.values() if isinstance(entry, Held)}

    def _told(self, reservation_id: str) -> Container[Position] | None:
        entry = self.entries.get(reservation_id)
        if entry is None or isinstance(entry, Held | Reservation | Voided):
            return self.partly.get(reservation_id, (0, None))[1]
        return entry[1]

    def _end(self, reservation_id: str, entry: Settled | Voided) -> None:
        self._forget(reservation_id)
        self.entries[reservation_id] = entry
        self._ended += 1
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        """The oldest come first; those that stand go to the end: none is looked at again and again."""
        entries = self.entries
        while self._ended > ENDED_MAX:
            names = list(islice(entries, STEP))
            oldest = list(map(entries.pop, names))
            self._ended -= len(names)
            if not OVER.issuperset(map(type, oldest)):
                standing = [pair for pair in zip(names, oldest, strict=True) if type(pair[1]) not in OVER]
                entries.update(standing)
                self._ended += len(standing)

    def _forget(self, reservation_id: str) -> Entry | None:
        entry = self.entries.pop(reservation_id, None)
        if entry is not None and type(entry) in OVER:
            self._ended -= 1
        return entry
