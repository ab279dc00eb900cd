"""The meter that takes whole record batches: the same fates, windows, rows and state as the plain one.

What is ordinary, which is nearly everything, goes through the kernels: `scan` reads the records, `hashing`
names them, `fold` deduplicates them, adds them up and writes the ledger's columns. What they don't vouch for
goes through `Meter.take`, record by record, in its place in the order. Between the two stands the plain
meter's own state, brought up to date before anybody looks (`_settle`). So there is one set of rules; a
property test holds the two against each other on any bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np

from meterline.domain.events import UsageEvent
from meterline.domain.totals import UsageProgress
from meterline.domain.windows import SKUS_PER_WINDOW_MAX, SkuTotal, WindowRef
from meterline.metering.fast.fold import (
    CELL_FIELDS,
    GROUP_FIELDS,
    RULE_FIELDS,
    STATE_FIELDS,
    fold_records,
)  # fmt: skip
from meterline.metering.fast.hashing import HASH_FIELDS, IDENTITY_LOW, Scratch, hash_records
from meterline.metering.fast.index import ArrayIndex
from meterline.metering.fast.memory import PADDING_BYTES
from meterline.metering.fast.rows import SPARE_MAX, Names, Rows
from meterline.metering.fast.scan import (
    B_START,
    BATCH,
    BATCH_FIELDS,
    CLIENT_CODE,
    CORRUPT,
    FIELDS,
    HEAD_BYTES,
    NONE,
    OCCURRED,
    OFFSET,
    ORDINARY,
    START,
    scan_batches,
)  # fmt: skip
from meterline.metering.meter import INT64_MAX, ClientTotal, DeadLetter, Flush, Meter, Read, WindowKey
from meterline.metering.state import Meta
from meterline.settings import MeteringSettings
from meterline.streaming.batches import BatchedRecords

__all__ = ["BatchMeter"]

UNKNOWN = -1
PADDING = bytes(PADDING_BYTES)


@dataclass(frozen=True, slots=True)
class Scanned:
    """A chunk after the scan.

    Attributes:
        data: bytes of all its batches, and some behind them.
        starts: where each batch begins in them.
        records: int64[records, FIELDS]: the meter's own array, which the next scan writes anew.
        odd: number of a record that is not ordinary -> what it is.
    """

    chunk: BatchedRecords
    data: Any
    starts: Sequence[int]
    records: Any
    odd: Mapping[int, Read]

    def record(self, number: int) -> Any:
        """One record, taken out of its batch."""
        batch, start = self.records[number, (BATCH, START)].tolist()
        return self.chunk.batches[batch].record(start - self.starts[batch])[0]

    def kept(self) -> Scanned:
        """The same with an array of its own."""
        return replace(self, records=self.records.copy())


class BatchMeter(Meter):
    """A meter of one partition that also takes `BatchedRecords`.

    Args:
        heads: framings, as bytes in front of an event, of the schema version the kernels read. Asked again
            for every chunk: registry ids become known as they are met.
    """

    def __init__(
        self,
        partition: int,
        settings: MeteringSettings,
        decode: Callable[[bytes | None], UsageEvent],
        meta: Meta,
        seen: ArrayIndex,
        heads: Callable[[], Sequence[bytes]],
    ) -> None:
        self._encoded = Rows()
        self._clients, self._skus, self._sources = Names(), Names(), Names()
        self._heads = heads
        self._index = seen
        self._scratch = Scratch().arrays()
        self._work = _Work(0)
        self._largest_chunk = 0
        """Records of the largest chunk of this flush."""
        self._largest_sum = self._widest = UNKNOWN
        self._length = meta.lengths.newest.length_ms
        super().__init__(partition, settings, decode, meta, seen)

    def _start_collecting(self) -> None:
        super()._start_collecting()
        self._encoded = Rows(self._encoded)
        for names in (self._clients, self._skus, self._sources):
            names.clear()
        if self._work.size > SPARE_MAX * self._largest_chunk:
            self._work = _Work(self._largest_chunk)
        self._largest_chunk = 0

    # -- restore, and what the ledger knows: the bounds below are asked anew

    def restore(self, state: Mapping[bytes, bytes]) -> None:
        """Bring back the windows and the totals from the committed state."""
        super().restore(state)
        self._largest_sum = self._widest = UNKNOWN

    def adopt_totals(self, sums: Mapping[str, SkuTotal]) -> None:
        """Take over from the ledger what an older state format did not hold."""
        super().adopt_totals(sums)
        self._largest_sum = UNKNOWN

    def kept_windows(self) -> dict[WindowKey, dict[str, SkuTotal]]:
        """What memory says every kept window adds up to, by SKU."""
        self._settle()
        return super().kept_windows()

    def add_past(self, ref: WindowRef, past: Mapping[str, SkuTotal]) -> None:
        """Tell what the ledger holds of a window up to the applied offset."""
        self._largest_sum = self._widest = UNKNOWN  # before what waited for it is decided
        super().add_past(ref, past)

    # -- take in

    def take(self, records: Iterable[Any]) -> None:
        """Decide the fate of each record: ledger, duplicate or dead letter."""
        if isinstance(records, BatchedRecords):
            self._take_batches(records)
        else:
            self._settle()
            super().take(records)

    def _take_batches(self, chunk: BatchedRecords) -> None:
        scanned = self._scan(chunk)
        if scanned is None:
            self._settle()
            super().take(chunk)  # and let it say what is wrong
            return
        if not len(scanned.records):
            return
        self.next_offset = int(scanned.records[-1, OFFSET]) + 1
        if self._knows(self._ended_windows(scanned)):
            self._decide_scanned(scanned)
        else:
            self._waiting.append(partial(self._decide_waiting, scanned.kept()))

    def _scan(self, chunk: BatchedRecords) -> Scanned | None:
        """Read each record by itself; None if the batches are not what their headers say."""
        batches = chunk.batches
        data = np.frombuffer(b"".join([*(batch.payload for batch in batches), PADDING]), np.uint8)
        table = np.empty((len(batches), BATCH_FIELDS), np.int64)
        at = count = 0
        for number, batch in enumerate(batches):
            end = at + len(batch.payload)
            table[number] = (at, end, batch.count, batch.base_offset, batch.timestamp, batch.timestamp_type)
            at = end
            count += batch.count
        self._largest_chunk = max(self._largest_chunk, count)
        if count > self._work.size:
            self._settle()
            self._work = _Work(count)
        heads, heads_n = _heads_array(self._heads())
        clients = self._clients.lend(count, len(data))
        skus = self._skus.lend(count, len(data))
        sources = self._sources.lend(count, len(data))
        records = self._work.records
        count = scan_batches(data, table, chunk.first_offset, heads, heads_n, clients, skus, sources, records)
        if count == CORRUPT:
            return None
        odd: dict[int, Read] = {}
        scanned = Scanned(chunk, data, table[:, B_START].tolist(), records[:count], odd)
        for number in np.flatnonzero(scanned.records[:, ORDINARY] == 0).tolist():
            read = odd[number] = self._read(scanned.record(number))
            records[number, OCCURRED] = NONE if isinstance(read[1], DeadLetter) else read[1].occurred_at
        return scanned

    def _ended_windows(self, scanned: Scanned) -> Iterator[WindowKey]:
        occurred_at = scanned.records[:, OCCURRED]
        lengths = self._lengths_at(occurred_at)
        starts = occurred_at - occurred_at % lengths
        numbers = np.flatnonzero((occurred_at >= 0) & (starts + lengths <= self.watermark))
        if not len(numbers):
            return
        self._settle()  # which windows there are is asked next
        clients = self._clients.texts()
        codes = scanned.records[numbers, CLIENT_CODE].tolist()
        for number, start, code in zip(numbers.tolist(), starts[numbers].tolist(), codes, strict=True):
            odd = scanned.odd.get(number)
            yield start, clients[code] if odd is None else cast(UsageEvent, odd[1]).client_id

    def _lengths_at(self, occurred_at: Any) -> Any:
        """Of the window of each event; one number where there is one."""
        changes = self._lengths.changes
        if len(changes) == 1:
            return changes[0].length_ms
        which = np.searchsorted([change.starts for change in changes[1:]], occurred_at, "right")
        return np.array([change.length_ms for change in changes])[which]

    def _decide_waiting(self, scanned: Scanned) -> None:
        self._decide_scanned(scanned)
        self._settle()  # as long as the pasts are there

    def _decide(self, reads: Sequence[Read]) -> None:
        self._settle()
        super()._decide(reads)

    def _decide_scanned(self, scanned: Scanned) -> None:
        records, odd = scanned.records, scanned.odd
        count = len(records)
        if not self._work.has_room(count):
            self._settle()
        hash_records(scanned.data, records, count, self._work.hashes, *self._scratch)
        # A copy of an id in a closed slice, within the horizon or not, is for the plain meter.
        older = self._index.may_be_older_by_low(self._work.hashes[:count, IDENTITY_LOW])
        records[older, ORDINARY] = 0
        self._one_length(records)
        self._index.make_room(count, self._appended_at)
        rows = self._encoded.lend(count, len(scanned.data))
        self._bound_sums()
        first = 0
        while (first := self._fold_scanned(scanned, first, rows)) < count:
            reads = [odd.get(first) or self._read(scanned.record(first))]
            while (first := first + 1) in odd:
                reads.append(odd[first])  # a flood of poison is taken at one go
            self._decide(reads)

    def _one_length(self, records: Any) -> None:
        """The kernel knows one length: windows of another than most events' are for the plain meter.

        Around a change, and for late events from before one; the others cost one comparison.
        """
        if len(self._lengths.changes) > 1:
            lengths = self._lengths_at(records[:, OCCURRED])
            known, counts = np.unique(lengths, return_counts=True)
            self._length = int(known[counts.argmax()])
            records[lengths != self._length, ORDINARY] = 0

    def _fold_scanned(self, scanned: Scanned, first: int, rows: tuple[Any, ...]) -> int:
        """Run the kernel up to a record that is for the plain meter; which one, or the count."""
        records = scanned.records
        work, settings = self._work, self._settings
        work.rules[:] = (
            self._length, settings.grace_ms, settings.allowed_lateness_ms, self._index.horizon_ms,
            SKUS_PER_WINDOW_MAX - self._widest,
        )  # fmt: skip
        room = max(0, INT64_MAX - self._largest_sum)
        taken = self._index.taken
        work.state[:] = (self._undecided, self._appended_at, self.watermark, 0, 0, room, taken)
        stopped = fold_records(
            scanned.data, records, work.hashes, first, len(records), work.rules, work.state,
            self._index.slots, work.group_table, work.groups, work.cell_table, work.cells, work.counts, rows,
        )  # fmt: skip
        self._undecided, self._appended_at, self.watermark, *counted, room_left, taken = work.state.tolist()
        self._skipped += counted[0]
        self._duplicates += counted[1]
        self._largest_sum += room - room_left
        self._index.taken = taken
        return int(stopped)

    def _settle(self) -> None:
        """Bring the windows and totals up to what the kernel added: once for each that changed.

        Before they are looked at or changed otherwise, so mostly once a flush. What is only shown
        (`open_windows`, `oldest_unpublished`) doesn't know of what came since.
        """
        groups, cells = self._work.changes()
        if not groups:
            return
        clients, skus = self._clients.texts(), self._skus.texts()
        touched = []
        for start, code, late, last_offset, _, count, credits_micro, free_count, free_credits_micro in groups:
            client = clients[code]
            window = self._open(start, client)
            self._count_late(window, late)
            window.last_offset = last_offset
            total = self._totals.get(client)
            if total is None:
                total = self._totals[client] = ClientTotal()
            total.last_offset = max(total.last_offset, last_offset)
            lifetime = total.sums
            lifetime.count += count
            lifetime.credits_micro += credits_micro
            lifetime.free_count += free_count
            lifetime.free_credits_micro += free_credits_micro
            touched.append((window.skus, self._changed[start, client]))
        self._changed_totals.update([clients[code] for _, code, *_ in groups])
        for group, code, count, credits_micro, free_count, free_credits_micro in cells:
            of_window, changed = touched[group]
            sku = skus[code]
            changed.add(sku)
            sums = of_window.get(sku)
            if sums is None:
                of_window[sku] = SkuTotal(count, credits_micro, free_count, free_credits_micro)
                self._widest = max(self._widest, len(of_window))
                continue
            sums.count += count
            sums.credits_micro += credits_micro
            if free_count:
                sums.free_count += free_count
                sums.free_credits_micro += free_credits_micro

    # -- bounds, so that the kernel needs to know no sum and no window

    def _bound_sums(self) -> None:
        """No sum is larger than `_largest_sum`, no window has more SKUs than `_widest`, those that may come
        back included. Exact now and then, and grown by what comes in between.
        """  # noqa: D205 - one sentence that needs two lines
        if self._largest_sum == UNKNOWN or self._largest_sum > INT64_MAX // 2:
            self._settle()
            sums = [total for skus in self._skus_of_windows() for total in skus.values()]
            sums += [total.sums for total in self._totals.values()]
            self._largest_sum = max(
                (max(abs(s.credits_micro), abs(s.free_credits_micro)) for s in sums), default=0
            )
        if self._widest == UNKNOWN or self._widest > SKUS_PER_WINDOW_MAX // 2:
            self._widest = max(map(len, self._skus_of_windows()), default=0)

    def _skus_of_windows(self) -> Iterator[Mapping[str, SkuTotal]]:
        yield from (window.skus for window in self.windows.values())
        yield from self._pasts.values()

    def _fold(self, event: UsageEvent, offset: int) -> None:
        super()._fold(event, offset)
        # What is not known stays so: a small number in its place would pass for a bound.
        if self._largest_sum != UNKNOWN:
            self._largest_sum += abs(event.credits_micro)
        if self._widest != UNKNOWN:
            start = self._lengths.start_of(event.occurred_at)
            self._widest = max(self._widest, len(self.windows[start, event.client_id].skus))

    # -- flush

    def build_flush(self, now_ms: int) -> Flush | None:
        """Decide what to write; None when there is nothing."""
        self._settle()
        encoded = self._encoded
        block = None
        if len(encoded):
            names = self._clients, self._skus, self._sources
            block = encoded.block(self.meta.topic_id, self.partition, *names)
        flush = super().build_flush(now_ms)
        return flush and replace(flush, block=block)

    def _next_meta(self, cutoff: int, progress: UsageProgress | None) -> Meta:
        meta = super()._next_meta(cutoff, progress)
        meta.counters.accepted += len(self._encoded)
        return meta


class _Work:
    """What the kernels write for one chunk, kept for the next one, as long as that is not much smaller."""

    def __init__(self, size: int) -> None:
        """For chunks of up to so many records."""
        room = 2 * size  # for what changed before, too
        slots = 1 << max(2 * room, 1).bit_length()
        self.size = size
        self.records = np.empty((size, FIELDS), np.int64)
        self.hashes = np.empty((size, HASH_FIELDS), np.uint64)
        self.rules = np.zeros(RULE_FIELDS, np.int64)
        self.state = np.zeros(STATE_FIELDS, np.int64)
        self.group_table = np.full(slots, -1, np.int32)
        self.groups = np.empty((room, GROUP_FIELDS), np.int64)
        self.cell_table = np.full(slots, -1, np.int32)
        self.cells = np.empty((room, CELL_FIELDS), np.int64)
        self.counts = np.zeros(2, np.int64)

    def has_room(self, records: int) -> bool:
        """Whether each of so many records may change a window and a SKU of its own."""
        return int(self.counts.max()) + records <= len(self.cells)

    def changes(self) -> tuple[list[list[int]], list[list[int]]]:
        """The windows and SKUs that changed since the last call."""
        groups, cells = self.counts.tolist()
        changed = self.groups[:groups].tolist(), self.cells[:cells].tolist()
        if groups:
            self.group_table.fill(-1)
            self.cell_table.fill(-1)
            self.counts[:] = 0
        return changed


def _heads_array(heads: Sequence[bytes]) -> tuple[Any, Any]:
    array = np.zeros((len(heads), HEAD_BYTES + PADDING_BYTES), np.uint8)
    for row, head in zip(array, heads, strict=True):
        row[: len(head)] = np.frombuffer(head, np.uint8)
    return array, np.array([len(head) for head in heads], np.int64)
