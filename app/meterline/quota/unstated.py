"""What was settled under a lease and no statement has named yet: one part for each source partition.

A statement names the largest offset settled in a partition, and the sum of the credits settled there. Many
parts become one, and the server's work no longer grows with the number of settled reservations. The bucket
keeps the sum as provisional until the log has accounted the largest offset: credits of the smaller ones stay
provisional a moment longer than they need. For this moment too little can be reserved, never too much.

The bucket can't find a part that it knows in such a sum. So the process that made the sum recognises a settle
that is repeated (`Leases.told`). Repeated elsewhere it counts twice, until the log has accounted it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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

    def add(self, settled: Iterable[Sequence[Part]], holds: Iterable[int]) -> int:
        """Note the parts of reservations.

        Args:
            settled: parts of each reservation.
            holds: what each holds.

        Returns:
            How much of what they hold the parts use up: one may cost more than is held for it.
        """
        sums = self._sums
        last_topic, last_partition = "", -1
        used = 0
        for parts, hold in zip(settled, holds, strict=True):
            left = hold
            for topic_id, partition, offset, micro in parts:
                if partition != last_partition or topic_id != last_topic:
                    last_topic, last_partition = topic_id, partition
                    found = sums.setdefault((topic_id, partition), [0, 0])
                if offset > found[0]:  # noqa: PLR1730 - max() takes five times as long
                    found[0] = offset
                found[1] += micro
                left -= micro
            used += hold if left < 0 else hold - left
        self.micro += used
        return used

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
