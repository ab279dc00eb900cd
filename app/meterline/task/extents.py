"""`Extents`: where each segment of a slot begins and ends. Pure."""

from __future__ import annotations

from meterline.task.segments import Position

__all__ = ["Extents"]


class Extents:
    """The segments that exist; their numbers follow one another. Not thread-safe: its owner locks.

    Args:
        begins: number -> offset of the first frame with records, behind the segment's head.
        ends: number -> offset behind the last durable frame.
        newest: the highest number that was ever given here.
    """

    def __init__(self, begins: dict[int, int], ends: dict[int, int], newest: int) -> None:
        self._begins, self._ends = begins, ends
        self.newest = newest

    def __bool__(self) -> bool:
        return bool(self._ends)

    def last(self) -> Position:
        """Where the next frame will be; (0, 0): there is no segment."""
        segment = max(self._ends, default=0)
        return Position(segment, self._ends.get(segment, 0))

    def add(self, segment: int, begin: int) -> None:
        """A new segment, after all others."""
        self._begins[segment] = self._ends[segment] = begin
        self.newest = segment

    def grow(self, segment: int, size: int) -> None:
        """One more durable frame."""
        self._ends[segment] += size

    def before(self, segment: int) -> list[int]:
        """The segments with lower numbers."""
        return [number for number in self._ends if number < segment]

    def remove(self, segment: int) -> None:
        """Its file is gone."""
        del self._begins[segment], self._ends[segment]

    def onward(self, place: Position) -> Position:
        """The same place, where the next frame is or will be: behind a head, not before another segment."""
        segment, offset = place
        while offset >= self._ends.get(segment, offset + 1) and segment + 1 in self._ends:
            segment, offset = segment + 1, 0
        return Position(segment, max(offset, self._begins.get(segment, 0)))

    def bytes_from(self, place: Position) -> int:
        """How many bytes of frames lie behind a place."""
        return sum(
            end - (place.offset if segment == place.segment else self._begins[segment])
            for segment, end in self._ends.items()
            if segment >= place.segment
        )
