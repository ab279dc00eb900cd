"""The owner of one partition of `usage.events`: the meter, the ledger and the topics around it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_from_record
from meterline.contracts.topics import USAGE_EVENTS_DLQ
from meterline.domain.events import UsageEvent
from meterline.ledger import queries
from meterline.ledger.reader import LedgerReader
from meterline.ledger.tables import EVENT_COLUMNS, EVENTS
from meterline.ledger.writer import LedgerWriter
from meterline.logs import get_logger
from meterline.metering.checks import (
    check_flood,
    check_log,
    check_windows,
    first_meta,
    lengths_asked_for,
)
from meterline.metering.meter import DeadLetter, Flush, Meter
from meterline.metering.outputs import progress_output, total_output, window_output
from meterline.metering.slices import SLICE_IDS_MAX
from meterline.metering.state import FORMAT_WITHOUT_TOTALS, Meta, meta_key
from meterline.metrics import (
    DEAD_LETTERS,
    DEDUPE_IDS,
    EVENTS_TAKEN,
    FLUSH_STEP_SECONDS,
    LATE_EVENTS,
    OLDEST_WINDOW_SECONDS,
    WATERMARK_AGE_SECONDS,
    WATERMARK_SECONDS,
    WINDOWS_OPEN,
    WINDOWS_PUBLISHED,
)
from meterline.settings import MeteringSettings
from meterline.streaming.clock import wall_clock_ms
from meterline.streaming.owner import Commit, CommitFn, LogRange, Output, PartitionOwner, SourceRecord
from meterline.streaming.steps import Step, reached

__all__ = ["MeteringOwner", "MeteringTools"]

log = get_logger(__name__)

PAGES_AT_ONCE = 2
"""Parts of dedupe indexes in memory while partitions are taken over, however many: one is read while another
is sorted. Each takes about 100 MB."""

INDEX_ROWS_ON_LOOP_MAX = 20_000
"""So many are put into an index at once, in milliseconds. A million take some tenths of a second, in a
thread: the other partitions' owners, and the heartbeats, want the loop."""

GAUGES = (WATERMARK_SECONDS, WATERMARK_AGE_SECONDS, WINDOWS_OPEN, OLDEST_WINDOW_SECONDS, DEDUPE_IDS)
"""Of a partition, as long as it is ours."""

MakeMeter = Callable[[int, MeteringSettings, Callable[[bytes | None], UsageEvent], Meta], Meter]
"""A meter that has seen nothing, for a partition and where it stands."""


@dataclass(frozen=True, slots=True)
class MeteringTools:
    """What the owners of one worker share."""

    settings: MeteringSettings
    writer: LedgerWriter
    reader: LedgerReader
    events: RecordCodec
    windows: RecordCodec
    totals: RecordCodec
    progress: RecordCodec
    dead_letters: RecordCodec
    window_partitions: int
    make_meter: MakeMeter
    now_ms: Callable[[], int] = wall_clock_ms
    rebuilding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PAGES_AT_ONCE))
    """Who holds it has a part of an index in memory."""


class MeteringOwner(PartitionOwner):
    """Feeds the meter, makes its flushes durable: rows first, then one transaction."""

    def __init__(self, partition: int, tools: MeteringTools) -> None:
        self._partition = partition
        self._tools = tools
        self._meter: Meter
        self._commit: CommitFn
        self._log: LogRange

    # -- take over

    async def restore(self, state: Mapping[bytes, bytes], log: LogRange, commit: CommitFn) -> int:
        """Check the state against the log and the ledger, rebuild the dedupe index.

        Raises:
            PartitionHalted: they contradict each other; the text names the range.
        """
        self._commit, self._log = commit, log
        settings, reader = self._tools.settings, self._tools.reader
        saved = state.get(meta_key(log.partition))
        if saved is None:
            in_ledger = await reader.ask(queries.partition_offsets, log.topic_id, log.partition)
            meta = first_meta(log, in_ledger, settings)
            # Before any insert: rows without a meta record mean a lost changelog, and only that.
            await commit(Commit([(meta_key(log.partition), meta.to_bytes())], [], meta.applied_offset))
        else:
            meta = Meta.from_bytes(saved)
        lacks_totals = meta.format == FORMAT_WITHOUT_TOTALS
        check_log(meta, log, settings)
        # Part of the first flush, whatever that is: before it nothing is said that depends on either.
        meta = self._lengthen(meta.brought_up_to_date(log.end_offset))
        self._meter = self._tools.make_meter(log.partition, settings, self._decoder(), meta)
        await self._rebuild_index(meta)
        self._meter.restore(state)
        if lacks_totals:
            self._meter.adopt_totals(
                await reader.ask(queries.lifetime_totals, log.topic_id, log.partition, meta.applied_offset)
            )
        await self._check_windows(meta)
        self._tell_replayed(await reader.ask(queries.last_offset, log.topic_id, log.partition), meta)
        WATERMARK_AGE_SECONDS.labels(self._partition).set_function(self._watermark_age_s)
        self._show()
        return self._meter.next_offset

    def _lengthen(self, meta: Meta) -> Meta:
        """Windows become as long as the settings ask for, if they ask for something new."""
        settings = self._tools.settings
        lengths = lengths_asked_for(meta, self._log, settings)
        if lengths != meta.lengths:
            log.info(
                "the length of windows changes",
                partition=self._partition,
                from_ms=meta.lengths.newest.length_ms,
                to_ms=lengths.newest.length_ms,
                starts=lengths.newest.starts,
            )
        elif lengths.newest.length_ms != settings.window_length_ms:
            log.warning(
                "the setting of this worker is older than the length of windows that stands in the state",
                partition=self._partition,
                setting_ms=settings.window_length_ms,
                length_ms=lengths.newest.length_ms,
                starts=lengths.newest.starts,
            )
        return replace(meta, lengths=lengths)

    async def _rebuild_index(self, meta: Meta) -> None:
        """From the ledger, page by page: each goes to a file before the next."""
        where, ask = (meta.topic_id, self._partition), self._tools.reader.ask
        since = max(0, meta.appended_at - self._tools.settings.dedupe_horizon_ms)
        pages = await ask(queries.dedupe_pages, *where, meta.applied_offset, since, SLICE_IDS_MAX)
        for page in pages:
            async with self._tools.rebuilding:
                ids = await ask(queries.dedupe_rows, *where, page)
                if ids[0].size < INDEX_ROWS_ON_LOOP_MAX:
                    self._meter.seen.add_all(*ids)
                else:
                    await asyncio.to_thread(self._meter.seen.add_all, *ids)

    def _tell_replayed(self, inserted: int | None, meta: Meta) -> None:
        """A crash between insert and commit leaves rows behind; they are inserted again, as the same rows."""
        if inserted is not None and inserted > meta.applied_offset:
            log.info(
                "rows of an uncommitted flush found; their offsets are read again",
                partition=self._partition,
                first_offset=meta.applied_offset + 1,
                last_offset=inserted,
            )

    async def _check_windows(self, meta: Meta) -> None:
        kept = self._meter.kept_windows()
        if not kept:
            return
        since, _ = min(kept)
        in_ledger = await self._tools.reader.ask(
            queries.kept_windows,
            meta.topic_id,
            self._partition,
            meta.applied_offset,
            since,
            meta.lengths,
        )
        check_windows(kept, in_ledger, meta, self._partition)

    def _decoder(self) -> Callable[[bytes | None], UsageEvent]:
        decode = self._tools.events.decode
        return lambda value: event_from_record(decode(value))

    # -- take in

    def feed(self, records: Iterable[SourceRecord]) -> None:
        """Hand the records to the meter."""
        self._meter.take(records)

    @property
    def pending(self) -> int:
        """Records taken in and not yet committed."""
        return self._meter.pending if hasattr(self, "_meter") else 0  # a restore that halted took none

    def on_caught_up(self, log_time_ms: int) -> None:
        """The log's clock goes on although nothing arrives."""
        self._meter.caught_up(log_time_ms)

    def on_idle(self, now_ms: int) -> None:
        """Let wall time close what is due."""
        self._meter.advance_watermark(now_ms - self._tools.settings.allowed_lateness_ms)

    # -- flush

    async def flush(self) -> None:
        """Rows into the ledger first; then changelog, snapshots and dead letters in one transaction."""
        await self._bring_pasts()
        check_flood(self._meter.brake.flood, self._log)
        with FLUSH_STEP_SECONDS.labels("build").time():
            flush = self._meter.build_flush(self._tools.now_ms())
        if flush is None:
            return
        reached(Step.FLUSH_BUILT)
        if flush.accepted:
            with FLUSH_STEP_SECONDS.labels("insert").time():
                await self._tools.writer.insert(EVENTS, EVENT_COLUMNS, flush.rows, flush.block)
            reached(Step.ROWS_INSERTED)
        tools = self._tools
        outputs = [
            window_output(snapshot, tools.windows, tools.window_partitions) for snapshot in flush.snapshots
        ]
        outputs += [self._dead_letter_output(dead) for dead in flush.dead_letters]
        outputs += [total_output(total, tools.totals) for total in flush.totals]
        if flush.progress is not None:
            outputs.append(progress_output(flush.progress, tools.progress))
        with FLUSH_STEP_SECONDS.labels("commit").time():
            await self._commit(Commit(flush.changelog, outputs, flush.meta.applied_offset))
        self._meter.committed(flush)
        self._count(flush)

    async def _bring_pasts(self) -> None:
        """Fetch what the waiting records need. More may come meanwhile, up to the limit of pending events."""
        applied = self._meter.meta.applied_offset
        while lacking := self._meter.windows_lacking_past():
            with FLUSH_STEP_SECONDS.labels("past").time():
                sums = await self._tools.reader.ask(queries.window_sums, [(ref, applied) for ref in lacking])
            for ref, past in zip(lacking, sums, strict=True):
                self._meter.add_past(ref, past)

    def _dead_letter_output(self, dead: DeadLetter) -> Output:
        record = dead.record
        letter = {
            "value": record.value,
            "key": record.key,
            "headers": [{"key": key, "value": value} for key, value in record.headers],
            "topic": self._log.topic,
            "topic_id": self._log.topic_id,
            "partition": self._partition,
            "offset": record.offset,
            "appended_at": record.timestamp,
            "reason": dead.reason,
            "detail": dead.detail,
        }
        # One hung worker must not hold up the readers of other partitions: source partition = dlq partition.
        return Output(USAGE_EVENTS_DLQ, self._partition, record.key, self._tools.dead_letters.encode(letter))

    # -- what people see

    def _count(self, flush: Flush) -> None:
        EVENTS_TAKEN.labels("accepted").inc(flush.accepted)
        EVENTS_TAKEN.labels("duplicate").inc(flush.duplicates)
        EVENTS_TAKEN.labels("dead_letter").inc(len(flush.dead_letters))
        LATE_EVENTS.labels("kept").inc(flush.late - flush.late_reopened)
        LATE_EVENTS.labels("reopened").inc(flush.late_reopened)
        for dead in flush.dead_letters:
            DEAD_LETTERS.labels(dead.reason).inc()
        if flush.snapshots:
            WINDOWS_PUBLISHED.inc(len(flush.snapshots))
            # One line for all: with thousands of clients a line for each would cost more than the windows.
            log.info(
                "windows closed",
                partition=self._partition,
                windows=len(flush.snapshots),
                first_start=min(snapshot.ref.start for snapshot in flush.snapshots),
                last_end=max(snapshot.ref.end for snapshot in flush.snapshots),
                cutoff=flush.meta.applied_offset,
                credits_micro=sum(snapshot.billable_credits_micro for snapshot in flush.snapshots),
            )
        self._show()

    def _show(self) -> None:
        meter, partition = self._meter, self._partition
        WATERMARK_SECONDS.labels(partition).set(meter.watermark / 1000)
        WINDOWS_OPEN.labels(partition).set(meter.open_windows)
        OLDEST_WINDOW_SECONDS.labels(partition).set((meter.oldest_unpublished or 0) / 1000)
        DEDUPE_IDS.labels(partition).set(len(meter.seen))

    def _watermark_age_s(self) -> float:
        return (self._tools.now_ms() - self._meter.watermark) / 1000

    def close(self) -> None:
        """Somebody else tells of this partition now."""
        for gauge in GAUGES:
            gauge.remove(self._partition)
