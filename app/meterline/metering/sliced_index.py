"""The dedupe index of the plain meter and of repairs: the newest slice a dict, the older ones files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meterline.metering.slices import LOW_MASK, SliceFiles

__all__ = ["SlicedIndex"]

TIME_BITS = 48
TIME_MASK = (1 << TIME_BITS) - 1


class SlicedIndex:
    """Identity hash -> payload digest and append time (milliseconds) of the copy that counts."""

    def __init__(self, files: SliceFiles) -> None:
        self._files = files
        # One integer a key: a tuple would double the memory.
        self._newest: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._newest) + len(self._files)

    def find(self, identity: int, appended_at: int, *, may_be_older: bool = True) -> int | None:
        """Payload digest of the copy that counts, or None if there was none within the horizon."""
        oldest = appended_at - self._files.horizon_ms
        packed = self._newest.get(identity)
        if packed is None or packed & TIME_MASK < oldest:
            return self._files.find(identity, oldest) if may_be_older else None
        return packed >> TIME_BITS

    def may_be_older(self, identities: Sequence[int]) -> Sequence[bool]:
        """Which ids may be in the files."""
        return self._files.may_hold_ids(identities)

    def add(self, identity: int, digest: int, appended_at: int) -> None:
        """Remember the copy that counts."""
        self._newest[identity] = digest << TIME_BITS | appended_at

    def add_all(self, lows: Any, highs: Any, digests: Any, appended_at: Any) -> None:
        """Put away a part of the ledger's ids; of one that stands twice, the later copy counts."""
        self._files.add_all(lows, highs, digests, appended_at)

    def close_slice(self, now: int) -> None:
        """Write the dict to a file if it is old or large enough."""
        ids, values = self._newest.keys(), self._newest.values()
        if not self._files.is_due(len(ids), now):
            return
        columns = (
            (identity & LOW_MASK for identity in ids),
            (identity >> 64 for identity in ids),
            (packed >> TIME_BITS for packed in values),
            (packed & TIME_MASK for packed in values),
        )
        low, high, digests, times = (np.fromiter(column, np.uint64, len(ids)) for column in columns)
        self._files.append((low, high, digests, times), now)
        self._newest = {}
