"""What was settled under a lease and no statement has named yet: one part for each source partition.

A statement names the largest offset settled in a partition, and the sum of the credits settled there. Many
parts become one, and the server's work no longer grows with the number of settled reservations. The bucket
keeps the sum as provisional until the log has accounted the largest offset: credits of the smaller ones stay
provisional a moment longer than they need. For this moment too little can be reserved, never too much.

The bucket can't find a part that it knows in such a sum. So the process that made the sum recognises a settle
that is repeated (`Reservations`). Repeated elsewhere it counts twice, until the log has accounted it.
"""

from __future__ import annotations

from meterline.quota.answers import Part

__all__ = ["Unstated"]


class Unstated:
    """Sums of settled parts, by source partition.

    Attributes:
        micro: what the lease still holds for them.
    """

    def __init__(self) -> None:
        """Nothing is settled yet."""
        self.micro = 0
        self._sums: dict[tuple[str, int], list[int]] = {}

    def __bool__(self) -> bool:
        """Whether something is to be stated."""
        return bool(self._sums)

    def add(self, source: tuple[str, int], offset: int, micro: int, held: int) -> None:
        """Note what was settled at or before an offset of a source partition.

        Args:
            source: topic id and partition.
            offset: the largest.
            micro: the sum.
            held: how much of it the lease holds; what a reservation cost beyond what it held, it doesn't.
        """
        found = self._sums.get(source)
        if found is None:
            found = self._sums[source] = [0, 0]
        if offset > found[0]:  # noqa: PLR1730 - max() takes five times as long
            found[0] = offset
        found[1] += micro
        self.micro += held

    def take(self, most: int) -> list[Part]:
        """The parts of the next statement, at most so many; they are no longer unstated.

        What is held goes to them as far as they cost so much: never more is given up than they are charged.
        """
        parts = []
        for source in list(self._sums)[:most]:
            offset, micro = self._sums.pop(source)
            self.micro -= min(micro, self.micro)
            parts.append(Part(*source, offset, micro))
        return parts
