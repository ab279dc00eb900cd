"""The dedupe index as an array the kernels can search. Says what `SlicedIndex` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meterline.metering.fast.fold import (
    ID_DIGEST,
    ID_FIELDS,
    ID_HIGH,
    ID_LOW,
    ID_TIME,
    NO_TIME,
    move_ids,
    slot_of,
)  # fmt: skip
from meterline.metering.fast.memory import power_of_two
from meterline.metering.slices import LOW_MASK, SliceFiles

__all__ = ["ArrayIndex"]

SLOTS_MIN = 1 << 12
SLOT_BYTES = 8 * ID_FIELDS
LOAD_MAX = 2 / 3
"""Share of the slots that may be taken: beyond, a search passes too many others."""


class ArrayIndex:
    """Identity hash -> payload digest and append time (ms) of the copy that counts. 32 bytes a slot.

    The array is the newest slice, which the kernels search and fill; the older ones are files. What is older
    than the horizon is found to be so, and leaves when the array is made anew.
    """

    def __init__(self, files: SliceFiles) -> None:
        self.horizon_ms = files.horizon_ms
        self._files = files
        self.taken = 0
        self.slots = _empty(SLOTS_MIN)
        self._newest = 0

    def __len__(self) -> int:
        return self.taken + len(self._files)

    def find(self, identity: int, appended_at: int, *, may_be_older: bool = True) -> int | None:
        """Payload digest of the copy that counts, or None if there was none within the horizon."""
        entry = self._entry(identity)
        if entry[ID_TIME] == NO_TIME or appended_at - int(entry[ID_TIME]) > self.horizon_ms:
            return self._files.find(identity, appended_at - self.horizon_ms) if may_be_older else None
        return int(entry[ID_DIGEST])

    def may_be_older(self, identities: Sequence[int]) -> Sequence[bool]:
        """Which ids may be in the files."""
        return self._files.may_hold_ids(identities)

    def may_be_older_by_low(self, lows: Any) -> Any:
        """The same of many, by their low bits: uint64[ids] -> bool[ids]."""
        return self._files.may_hold(lows)

    def add(self, identity: int, digest: int, appended_at: int) -> None:
        """Remember the copy that counts."""
        self.make_room(1, appended_at)
        entry = self._entry(identity)
        self.taken += bool(entry[ID_TIME] == NO_TIME)
        entry[ID_LOW], entry[ID_HIGH] = identity & LOW_MASK, identity >> 64
        entry[ID_DIGEST], entry[ID_TIME] = digest, appended_at

    def add_all(self, lows: Any, highs: Any, digests: Any, appended_at: Any) -> None:
        """Put away a part of the ledger's ids; of one that stands twice, the later copy counts."""
        self._files.add_all(lows, highs, digests, appended_at)

    def close_slice(self, now: int) -> None:
        """Write the array to a file if it is old or large enough."""
        if not self._files.is_due(self.taken, now):
            return
        ids = self.slots[self.slots[:, ID_TIME] != NO_TIME]
        columns = ids[:, ID_LOW], ids[:, ID_HIGH], ids[:, ID_DIGEST], ids[:, ID_TIME]
        self._files.append(columns, now)
        # The next slice will want as many: of one that took in a backlog, the room is not kept.
        slots = max(SLOTS_MIN, power_of_two(2 * self.taken))
        if slots < len(self.slots):
            self.slots = _empty(slots)
        else:
            self.slots[:, ID_TIME] = NO_TIME
        self.taken = 0

    def make_room(self, more: int, appended_at: int) -> None:
        """Let so many more ids fit in, the newest of them appended at that time."""
        self._newest = max(self._newest, appended_at)
        if self.taken + more <= len(self.slots) * LOAD_MAX:
            return
        old, times = self.slots, self.slots[:, ID_TIME]
        oldest = max(0, self._newest - self.horizon_ms)
        kept = int(np.count_nonzero((times != NO_TIME) & (times >= np.uint64(oldest))))
        self.slots = _empty(power_of_two((kept + more) * 2))
        self.taken = move_ids(old, self.slots, self._newest, self.horizon_ms)

    def _entry(self, identity: int) -> Any:
        return self.slots[slot_of(self.slots, np.uint64(identity & LOW_MASK), np.uint64(identity >> 64))]


def _empty(slots: int) -> Any:
    """Free slots. None lies across two lines of the cache: every search would wait for both."""
    memory = np.empty(slots * SLOT_BYTES + SLOT_BYTES, np.uint8)
    first = -memory.ctypes.data % SLOT_BYTES
    index = memory[first : first + slots * SLOT_BYTES].view(np.uint64).reshape(slots, ID_FIELDS)
    index[:, ID_TIME] = NO_TIME
    return index
