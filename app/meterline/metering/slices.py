"""The older slices of a dedupe index: sorted, immutable, mapped from disk. 24 bytes an id.

A slice is written when it closes, to a file that has no name: it is unlinked as soon as it is mapped. So
nothing can ever read a torn, stale or foreign one, and a killed worker leaves nothing behind. A slice is a
cache of the ledger's rows, made anew at each assignment.

A slice of n ids is four columns, sorted by the first: low 64 bits and high 32 bits of the identity, payload
digest, append time counted from the slice's oldest id. In front of the file stands a Bloom filter in memory,
a byte an id: of the ids that are new, nearly all are known to be so without touching the file.
"""

from __future__ import annotations

import mmap
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meterline.domain.dedupe import SLICES_PER_HORIZON
from meterline.errors import PartitionHalted
from meterline.settings import MeteringSettings

__all__ = ["LOW_MASK", "SliceFiles"]

LOW_MASK = 2**64 - 1

TIME_BITS = 24
"""Three bytes of milliseconds: 4.6 hours, more than a slice of the usual horizon spans."""

SLICE_IDS_MAX = 1_000_000
"""A slice closes at so many ids, whatever its time: what is in memory is bounded (a dict of them takes
170 MB), and so is the pause in which they are sorted (a fifth of a second)."""

BYTES_PER_ID = 8 + 4 + 8 + TIME_BITS // 8
IDS_PER_WORD = 8
"""A byte of filter an id: one look-up in thirty of an id that isn't there searches the file in vain."""

ASKED_AT_ONCE_MIN = 32
"""Of fewer ids the filters are asked one by one: the preparations for many cost more."""

SPREAD = 0x9E3779B97F4A7C15


class SliceFiles:
    """The closed slices of one partition.

    Args:
        folder: where the files lie.
        bytes_max: how large they may be together.
    """

    def __init__(self, folder: Path, bytes_max: int, horizon_ms: int) -> None:
        self.horizon_ms = horizon_ms
        self.slice_ms = max(1, min(horizon_ms // SLICES_PER_HORIZON, 2**TIME_BITS - 1))
        self._folder = folder
        self._bytes_max = bytes_max
        self._slices: list[_Slice] = []
        self._began: int | None = None

    @classmethod
    def of(cls, settings: MeteringSettings) -> SliceFiles:
        """Where the settings want them, as long as they say."""
        folder = Path(settings.dedupe_dir or tempfile.gettempdir())
        return cls(folder, settings.dedupe_disk_bytes_max, settings.dedupe_horizon_ms)

    def __len__(self) -> int:
        return sum(map(len, self._slices))

    @property
    def bytes(self) -> int:
        """On disk, all of them."""
        return len(self) * BYTES_PER_ID

    def find(self, identity: int, oldest: int) -> int | None:
        """Payload digest of the copy that was appended at that time (ms) or later; None if there is none."""
        if not self._slices:
            return None
        low, high = identity & LOW_MASK, identity >> 64
        spread = low * SPREAD & LOW_MASK
        bits = 1 << (spread & 63) | 1 << (spread >> 6 & 63) | 1 << (spread >> 12 & 63)
        for of in reversed(self._slices):
            if of.newest >= oldest and of.words[(spread >> 32) * len(of.words) >> 32] & bits == bits:
                digest = of.find(low, high, oldest)
                if digest is not None:
                    return digest
        return None

    def may_hold_ids(self, identities: Sequence[int]) -> Sequence[bool]:
        """What `may_hold` says, of ids that are no array; of a few nothing is denied."""
        if not self._slices or len(identities) < ASKED_AT_ONCE_MIN:
            return [bool(self._slices)] * len(identities)
        lows = np.fromiter((identity & LOW_MASK for identity in identities), np.uint64, len(identities))
        held: list[bool] = self.may_hold(lows).tolist()
        return held

    def may_hold(self, lows: Any) -> Any:
        """Which of these ids are in a slice, whatever their time, as far as 64 of their bits tell: bool[ids].

        What it denies is in none; what it affirms is for `find`.

        Args:
            lows: uint64[ids], low bits of the identities.
        """
        held = np.zeros(lows.size, np.bool_)
        if not self._slices:
            return held
        spread = lows * np.uint64(SPREAD)
        bits = _bits(spread)
        spread >>= np.uint64(32)
        for of in self._slices:
            words = of.filter[_words(spread, of.filter.size)]
            maybe = np.flatnonzero((words & bits) == bits)
            if maybe.size:
                held[maybe] |= of.may_hold(lows[maybe])
        return held

    def add_all(self, lows: Any, highs: Any, digests: Any, appended_at: Any) -> None:
        """Put away ids as closed slices, while none is open; see SeenIds. Raises what `append` raises."""
        if lows.size:
            self.append((lows, highs, digests, appended_at), int(appended_at.max()))

    def is_due(self, ids: int, now: int) -> bool:
        """Whether the open slice, of so many ids, is to be closed. It begins when it is first asked of."""
        if not ids:
            return False
        if self._began is None:
            self._began = now
        return now - self._began >= self.slice_ms or ids >= SLICE_IDS_MAX

    def append(self, columns: tuple[Any, Any, Any, Any], now: int) -> None:
        """Close a slice, and forget those whose last id is beyond the horizon.

        Args:
            columns: low bits, high bits, payload digests, append times (ms): uint64[ids] each, in no order.

        Raises:
            PartitionHalted: the limit is reached, or the disk refuses.
        """
        self._began = None
        oldest = now - self.horizon_ms
        self._slices = [of for of in self._slices if of.newest >= oldest]
        times = columns[3]
        if (bytes_ := self.bytes + times.size * BYTES_PER_ID) > self._bytes_max:
            raise PartitionHalted(
                f"the dedupe index needs {bytes_:,} bytes in {self._folder}, and may have "
                f"{self._bytes_max:,}. Nothing is forgotten, so nothing is taken. Raise "
                "METERLINE_METERING__DEDUPE_DISK_BYTES_MAX or shorten METERLINE_METERING__DEDUPE_HORIZON_MS, "
                "and start the worker again"
            )
        # One group, but for a broker's clock that jumped: three bytes can't tell its span.
        groups = (times - times.min()) >> np.uint64(TIME_BITS)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for group in np.unique(groups):
                chosen = groups == group
                self._slices.append(_Slice(self._folder, *(column[chosen] for column in columns)))
        except OSError as error:
            raise PartitionHalted(
                f"a slice of the dedupe index can't be written in {self._folder}: {error}. Make room there, "
                "or name another folder in METERLINE_METERING__DEDUPE_DIR, and start the worker again"
            ) from error


class _Slice:
    """One file without a name, and its filter."""

    def __init__(self, folder: Path, lows: Any, highs: Any, digests: Any, times: Any) -> None:
        order = np.argsort(lows)
        count = lows.size
        self.base, self.newest = int(times.min()), int(times.max())
        since = (times[order] - np.uint64(self.base)).astype("<u4")
        with tempfile.TemporaryFile(dir=folder) as file:
            for column in (
                lows[order].astype("<u8"),
                digests[order].astype("<u8"),
                highs[order].astype("<u4"),
                since.view(np.uint8).reshape(count, 4)[:, :3],
            ):
                file.write(np.ascontiguousarray(column).data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), count * BYTES_PER_ID, access=mmap.ACCESS_READ)
        self._times = memoryview(mapped)[20 * count :]
        self._lows = np.frombuffer(mapped, "<u8", count)
        self._digests = np.frombuffer(mapped, "<u8", count, 8 * count)
        self._highs = np.frombuffer(mapped, "<u4", count, 16 * count)
        self.filter = np.zeros(-(-count // IDS_PER_WORD), np.uint64)
        spread = lows * np.uint64(SPREAD)
        bits = _bits(spread)
        np.bitwise_or.at(self.filter, _words(spread >> np.uint64(32), self.filter.size), bits)
        self.words: Any = self.filter.data
        self._sorted = memoryview(mapped)[: 8 * count].cast("Q")

    def __len__(self) -> int:
        return self._lows.size

    def find(self, low: int, high: int, oldest: int) -> int | None:
        found = None
        at = bisect_left(self._sorted, low)
        while at < len(self._sorted) and self._sorted[at] == low:
            time = self.base + int.from_bytes(self._times[3 * at : 3 * at + 3], "little")
            if self._highs[at] == high and time >= oldest:
                oldest, found = time, int(self._digests[at])  # of one that stands twice, the later
            at += 1
        return found

    def may_hold(self, lows: Any) -> Any:
        at = np.searchsorted(self._lows, lows)
        at[at == self._lows.size] = 0
        return self._lows[at] == lows


def _bits(spread: Any) -> Any:
    one, six_bits = np.uint64(1), np.uint64(63)
    return (
        one << (spread & six_bits)
        | one << (spread >> np.uint64(6) & six_bits)
        | one << (spread >> np.uint64(12) & six_bits)
    )


def _words(spread_high: Any, words: int) -> Any:
    """Spread evenly over so many words, without a division."""
    return (spread_high * np.uint64(words)) >> np.uint64(32)
