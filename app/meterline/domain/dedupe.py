"""Which events were seen: exact within a horizon counted in broker append time.

The horizon counts append time, not `occurred_at`: a retried task with a new time in another window must still
be found. Whether a copy is a duplicate depends on the two records alone, never on when memory was tidied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["SLICES_PER_HORIZON", "SeenIds"]

SLICES_PER_HORIZON = 24
"""Ids leave in slices, each with its last id: none is held longer than the horizon and the span of two."""


class SeenIds(Protocol):
    """What a meter asks of an index. Two that were given the same answer the same."""

    def __len__(self) -> int:
        """Ids it holds; some may be beyond the horizon and not tidied away."""

    def find(self, identity: int, appended_at: int, *, may_be_older: bool = True) -> int | None:
        """Payload digest of the copy that counts, or None if there was none within the horizon.

        Args:
            identity: whose.
            appended_at: from when the horizon counts, back (ms).
            may_be_older: what the method of that name says; False spares a look through the older slices.
        """

    def may_be_older(self, identities: Sequence[int]) -> Sequence[bool]:
        """Which ids may be in the older slices: what is false is in none, until the next one is closed.

        To be asked of all at once: of many it costs a fraction of what as many looks would.
        """

    def add(self, identity: int, digest: int, appended_at: int) -> None:
        """Remember the copy that counts."""

    def add_all(self, lows: Any, highs: Any, digests: Any, appended_at: Any) -> None:
        """Put away ids of the ledger's, as an index is rebuilt: one part after the other, the oldest first.

        Within a part they come in any order; where an id stands twice, the later copy counts.

        Args:
            lows: low 64 bits of the identities; like the others an array, uint64[ids].
            highs: the bits above.
            digests: of the payloads.
            appended_at: in ms.
        """

    def close_slice(self, now: int) -> None:
        """Let it put away its newest slice when that is due, at the largest append time so far (ms).

        Never while a chunk is decided: who decides may have looked through the older slices already.
        """
