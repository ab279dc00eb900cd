"""Which events were seen: exact within a horizon counted in broker append time.

The horizon counts append time, not `occurred_at`: a retried task with a new time in another window must still
be found. Whether a copy is a duplicate depends on the two records alone, never on when memory was tidied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

__all__ = ["DedupeIndex", "SeenIds"]

_TIME_BITS = 48
_TIME_MASK = (1 << _TIME_BITS) - 1

SLICES_PER_HORIZON = 24
"""Ids leave in slices: at most one slice more than the horizon is held."""


class SeenIds(Protocol):
    """What a meter asks of an index. Two that were given the same answer the same."""

    def __len__(self) -> int:
        """Ids it holds; some may be beyond the horizon and not tidied away."""

    def find(self, identity: int, appended_at: int) -> int | None:
        """Payload digest of the copy that counts, or None if there was none within the horizon."""

    def add(self, identity: int, digest: int, appended_at: int) -> None:
        """Remember the copy that counts."""

    def add_all(self, identities: Iterable[int], digests: Iterable[int], appended_at: Iterable[int]) -> None:
        """Rebuild from columns in any order; where an id stands twice, the later copy counts."""

    def close_slice(self, now: int) -> None:
        """Let it put away its newest slice when that is due, at the largest append time so far (ms).

        Never while a chunk is decided: who decides may have looked through the older slices already.
        """


class DedupeIndex:
    """Identity hash -> payload digest and append time (milliseconds) of the copy that counts.

    All in memory: for a repair, which looks at a partition once. A worker's index has files for its older
    slices (`metering.slices`).
    """

    def __init__(self, horizon_ms: int) -> None:
        self._horizon_ms = horizon_ms
        self._slice_ms = max(1, horizon_ms // SLICES_PER_HORIZON)
        # One integer a key: a tuple would double the memory.
        self._seen: dict[int, int] = {}
        self._slices: dict[int, list[int]] = {}
        self._newest = 0

    def __len__(self) -> int:
        return len(self._seen)

    def find(self, identity: int, appended_at: int) -> int | None:
        """Payload digest of the copy that counts, or None if there was none within the horizon."""
        packed = self._seen.get(identity)
        if packed is None or appended_at - (packed & _TIME_MASK) > self._horizon_ms:
            return None
        return packed >> _TIME_BITS

    def add(self, identity: int, digest: int, appended_at: int) -> None:
        """Remember the copy that counts."""
        self._seen[identity] = digest << _TIME_BITS | appended_at
        number = appended_at // self._slice_ms
        ids = self._slices.get(number)
        if ids is None:
            ids = self._slices[number] = []
            if number > self._newest:
                self._newest = number
                self._forget(appended_at)
        ids.append(identity)

    def add_all(self, identities: Iterable[int], digests: Iterable[int], appended_at: Iterable[int]) -> None:
        """Rebuild from columns in any order; where an id stands twice, the later copy counts."""
        for identity, digest, at in sorted(
            zip(identities, digests, appended_at, strict=True), key=lambda row: row[2]
        ):
            self.add(identity, digest, at)

    def close_slice(self, now: int) -> None:
        """Nothing to do: all of it is in memory."""

    def _forget(self, now: int) -> None:
        for number in [n for n in self._slices if (n + 1) * self._slice_ms < now - self._horizon_ms]:
            for identity in self._slices.pop(number):
                packed = self._seen.get(identity)
                if packed is not None and (packed & _TIME_MASK) // self._slice_ms == number:
                    del self._seen[identity]
