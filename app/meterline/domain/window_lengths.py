"""How long windows are, where that changed: by event time, so that every worker finds the same windows.

A change begins at an edge that windows of the former and of the new length share. So every event is in one
window, whichever worker takes it and however late it is, and a start tells the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

from meterline.domain.windows import window_start_of

__all__ = ["LENGTHS_MAX", "SHARED_EDGE_MS_MAX", "LengthChange", "WindowLengths"]

LENGTHS_MAX = 20
"""Changes of one partition. Its META holds them all for ever, because an event may be late by any time."""

SHARED_EDGE_MS_MAX = 31 * 24 * 60 * 60_000
"""Windows of two lengths begin together at least this often: the longest window there can be. 30 and 31 days
would meet every 930."""


@dataclass(frozen=True, slots=True)
class LengthChange:
    """Windows that begin at `starts` or later are `length_ms` long.

    Attributes:
        since: event time (ms) from which it was asked for; the later of two is the newer one.
        starts: the edge at or after it at which it begins (ms).
    """

    since: int
    starts: int
    length_ms: int


@dataclass(frozen=True, slots=True)
class WindowLengths:
    """The lengths of one partition's windows, oldest first; the first one begins with time."""

    changes: tuple[LengthChange, ...]

    @classmethod
    def of(cls, length_ms: int, since: int = 0) -> WindowLengths:
        """One length for all events."""
        return cls((LengthChange(since, 0, length_ms),))

    @classmethod
    def from_windows(cls, windows: Iterable[tuple[int, int]]) -> WindowLengths:
        """What the lengths must have been for these windows, of which there is at least one.

        Args:
            windows: start and end (ms), oldest first.

        Raises:
            ValueError: two of them share no edge between them.
        """
        lengths: WindowLengths | None = None
        former_end = 0
        for start, end in windows:
            if lengths is None:
                lengths = cls.of(end - start)
            elif lengths.newest.length_ms != end - start:
                lengths = lengths.changed(end - start, former_end, 0)
                if lengths.newest.starts > start:
                    raise ValueError(f"windows of two lengths overlap before {start}")
            former_end = end
        if lengths is None:
            raise ValueError("no windows")
        return lengths

    @property
    def newest(self) -> LengthChange:
        """The length of windows from its edge on."""
        return self.changes[-1]

    def at(self, time: int) -> int:
        """Length (ms) of the windows at an event time, or of the window that starts there."""
        for change in reversed(self.changes):
            if change.starts <= time:
                return change.length_ms
        return self.changes[0].length_ms

    def start_of(self, occurred_at: int) -> int:
        """Start (ms) of the window that holds an event."""
        return window_start_of(occurred_at, self.at(occurred_at))

    def end_of(self, start: int) -> int:
        """End (ms) of the window that begins there."""
        return start + self.at(start)

    def changed(self, length_ms: int, since: int, not_before: int) -> WindowLengths:
        """These, and a newer length.

        Args:
            since: event time (ms) from which it is asked for.
            not_before: event time (ms) up to which a window may hold events already.

        Raises:
            ValueError: the two lengths share too few edges, or there are too many changes; the text says so.
        """
        shared = lcm(self.newest.length_ms, length_ms)
        if shared > SHARED_EDGE_MS_MAX:
            raise ValueError(
                f"windows of {self.newest.length_ms} and of {length_ms} ms begin together only every "
                f"{shared} ms, and {SHARED_EDGE_MS_MAX} is the most. Choose one that divides the other"
            )
        if len(self.changes) >= LENGTHS_MAX:
            raise ValueError(f"the length was changed {len(self.changes) - 1} times, and that is the most")
        earliest = max(since, not_before, self.newest.starts)
        starts = -(-earliest // shared) * shared
        return WindowLengths((*self.changes, LengthChange(since, starts, length_ms)))
