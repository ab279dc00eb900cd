"""Usage records that wait for their request: in order per customer and meter, side by side otherwise."""

from __future__ import annotations

import heapq
from collections import deque
from itertools import count

__all__ = ["SendQueue"]

Lane = tuple[str, str]


class SendQueue:
    """Identifiers by lane (customer, meter). A lane that gave one out gives no other until it is `freed`.

    A record that waits for its next try doesn't block the others of its lane.
    """

    def __init__(self) -> None:
        self._lanes: dict[Lane, deque[str]] = {}
        self._ready: deque[Lane] = deque()
        self._given: set[Lane] = set()
        self._later: list[tuple[int, int, Lane, str]] = []
        self._order = count()

    def push(self, lane: Lane, identifier: str, not_before_ms: int = 0) -> None:
        """Let a record wait for its turn, and for a time."""
        if not_before_ms:
            heapq.heappush(self._later, (not_before_ms, next(self._order), lane, identifier))
            return
        waiting = self._lanes.setdefault(lane, deque())
        waiting.append(identifier)
        if len(waiting) == 1 and lane not in self._given:
            self._ready.append(lane)

    def take(self, now_ms: int) -> tuple[Lane, str] | None:
        """The next record whose lane is free; the longest-waiting lane first."""
        while self._later and self._later[0][0] <= now_ms:
            _, _, lane, identifier = heapq.heappop(self._later)
            self.push(lane, identifier)
        if not self._ready:
            return None
        lane = self._ready.popleft()
        self._given.add(lane)
        return lane, self._lanes[lane].popleft()

    def free(self, lane: Lane) -> None:
        """The record this lane gave out has its answer, or was put back."""
        self._given.discard(lane)
        if self._lanes.get(lane):
            self._ready.append(lane)
        else:
            self._lanes.pop(lane, None)
