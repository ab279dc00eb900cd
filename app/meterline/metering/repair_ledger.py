"""Rows the ledger has lost: decided again from the log by the same meter, inserted if it is right then.

The log is read twice: first to see what is missing, so that nothing is inserted unless the ledger will equal
what metering has committed; then to insert it. A row that is there already is left alone. All of it blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple

from confluent_kafka import Message

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_from_record
from meterline.contracts.topics import USAGE_EVENTS
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SkuTotal, WindowRef
from meterline.ledger import queries, repair_queries
from meterline.ledger.tables import EVENT_COLUMNS, EVENTS
from meterline.ledger.writer import LedgerWriter
from meterline.metering.checks import check_windows, repair_command
from meterline.metering.meter import Meter
from meterline.metering.repair_evidence import (
    Evidence,
    RepairTools,
    different_totals,
    lengths_that_were,
    refused,
    restored_meter,
)
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SLICE_IDS_MAX, SliceFiles
from meterline.metering.state import Counters, Meta, meta_key
from meterline.settings import ClickHouseSettings
from meterline.streaming.committed import offset_of, read_committed
from meterline.streaming.owner import LogRange

__all__ = ["LedgerPlan", "insert_missing", "plan_ledger"]

RANGES_KEPT_MAX = 20
"""Of the missing offsets; their number is always told."""

_COLUMN = {name: number for number, name in enumerate(EVENT_COLUMNS)}
_Row = tuple[Any, ...]


class LoggedRecord(NamedTuple):
    """What a meter asks of a record."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


@dataclass(slots=True)
class LedgerPlan:
    """What is missing in a range, and what became of its other records.

    Attributes:
        applied: the offset up to which the ledger must equal what is committed.
        lengths: of the windows.
        missing: how many rows.
        ranges: the first of their offsets, first and last of each run.
        totals: client -> what the missing rows add up to.
        windows: (window start in ms, client, SKU) -> the same.
        last_offsets: (window start in ms, client) -> offset of the last missing row.
    """

    log: LogRange
    first: int
    last: int
    applied: int
    lengths: WindowLengths
    counters: Counters = field(default_factory=Counters)
    missing: int = 0
    ranges: list[list[int]] = field(default_factory=list)
    totals: dict[str, SkuTotal] = field(default_factory=dict)
    windows: dict[tuple[int, str, str], SkuTotal] = field(default_factory=dict)
    last_offsets: dict[tuple[int, str], int] = field(default_factory=dict)

    @property
    def credits_micro(self) -> int:
        """What the missing rows are worth, billable or not."""
        return sum(total.credits_micro + total.free_credits_micro for total in self.totals.values())

    def note(self, row: _Row) -> None:
        """One missing row."""
        offset = row[_COLUMN["offset"]]
        self.missing += 1
        if self.ranges and self.ranges[-1][1] == offset - 1:
            self.ranges[-1][1] = offset
        elif len(self.ranges) < RANGES_KEPT_MAX:
            self.ranges.append([offset, offset])
        client, start = row[_COLUMN["client_id"]], self.lengths.start_of(row[_COLUMN["occurred_at"]])
        key = (start, client, row[_COLUMN["sku"]])
        self.last_offsets[start, client] = offset
        credits_micro, billable = row[_COLUMN["credits_micro"]], row[_COLUMN["billable"]]
        for sums in (
            self.totals.setdefault(client, SkuTotal()),
            self.windows.setdefault(key, SkuTotal()),
        ):
            _add(sums, SkuTotal(1, credits_micro) if billable else SkuTotal(0, 0, 1, credits_micro))


def plan_ledger(tools: RepairTools, evidence: Evidence, first: int | None, last: int | None) -> LedgerPlan:
    """Read the range, decide it again, and hold what the ledger would be against what is committed.

    Args:
        first: offset the range begins with; None: the first counted one that the log still holds.
        last: its last offset; None: the last one that was counted.

    Raises:
        PartitionHalted: the range is not in the log, or inserting what is missing in it would not make the
            ledger right; the text names the exact range, or what would still differ.
    """
    log, saved = evidence.log, evidence.state.get(meta_key(evidence.log.partition))
    meta = Meta.from_bytes(saved) if saved is not None else None
    if meta is not None and meta.topic_id != log.topic_id:
        raise refused(
            log,
            f"the topic was re-created, the log of {meta.topic_id} is gone and its rows can't be read again. "
            "Restore them from a copy",
        )
    applied = meta.applied_offset if meta is not None else evidence.statements.published_until
    counted_since = meta.counters.first_offset if meta is not None else 0
    first = max(log.start_offset, counted_since) if first is None else first
    last = min(applied, log.end_offset - 1) if last is None else last
    if not max(log.start_offset, counted_since) <= first <= last <= min(applied, log.end_offset - 1):
        raise refused(
            log,
            f"offsets {first}..{last} can't be read again: {counted_since}..{applied} were counted, and the "
            f"log holds {log.start_offset}..{log.end_offset - 1}",
        )
    lengths = meta.lengths if meta is not None else lengths_that_were(tools, log)
    plan = LedgerPlan(log, first, last, applied, lengths)
    for rows in _missing_rows(tools, plan):
        for row in rows:
            plan.note(row)
    _require_equal(tools, evidence, meta, plan)
    return plan


def insert_missing(tools: RepairTools, plan: LedgerPlan, settings: ClickHouseSettings) -> None:
    """Read the range again and insert what a plan has found missing. Again: inserts nothing.

    Returns when ClickHouse has acknowledged every row. It waits for a server that is away.
    """

    async def insert() -> None:
        writer = LedgerWriter(settings)
        try:
            for rows in _missing_rows(tools, plan):
                await writer.insert(EVENTS, EVENT_COLUMNS, list(zip(*rows, strict=True)))
        finally:
            await writer.close()

    asyncio.run(insert())


def _missing_rows(tools: RepairTools, plan: LedgerPlan) -> Iterator[list[_Row]]:
    """Decide the range from its first record on; of each piece, the accepted rows the ledger doesn't have.

    The dedupe index begins with what the ledger has below the range; if rows are missing there, too, a
    duplicate may be taken for an event, and `_require_equal` refuses the plan.
    """
    log, ask = plan.log, tools.ledger.ask
    meter: Meter | None = None
    for records in _records(tools, plan):
        if meter is None:
            meter = _meter_before(tools, plan, records[0].timestamp)
        meter.take(records)
        _bring_pasts(tools, meter)
        # Its windows and totals are nobody's: what counts are the rows.
        flush = meter.build_flush(time.time_ns() // 1_000_000)
        if flush is None:
            continue
        meter.committed(flush)
        plan.counters = flush.meta.counters
        present = ask(
            repair_queries.event_offsets, log.topic_id, log.partition, records[0].offset, records[-1].offset
        )
        decided: Sequence[_Row] = list(zip(*flush.rows, strict=True))
        offsets = {row[_COLUMN["offset"]] for row in decided}
        if present - offsets:
            raise refused(
                log,
                f"the ledger has events at offsets {sorted(present - offsets)[:RANGES_KEPT_MAX]}, which are "
                "duplicates or dead letters as the log and the rows below "
                f"{plan.first} have it. Begin with a lower --from, or restore the rows from a copy",
            )
        if rows := [row for row in decided if row[_COLUMN["offset"]] not in present]:
            yield rows


def _bring_pasts(tools: RepairTools, meter: Meter) -> None:
    """What the limits of windows that come back are judged with, as far as the ledger has it."""
    while lacking := meter.windows_lacking_past():
        applied = meter.meta.applied_offset
        sums = tools.ledger.ask(queries.window_sums, [(ref, applied) for ref in lacking])
        for ref, past in zip(lacking, sums, strict=True):
            meter.add_past(ref, past)


def _records(tools: RepairTools, plan: LedgerPlan) -> Iterator[list[LoggedRecord]]:
    for messages in read_committed(tools.kafka, USAGE_EVENTS, plan.log.partition, plan.first):
        records = [_record(message) for message in messages if offset_of(message) <= plan.last]
        if records:
            yield records
        if offset_of(messages[-1]) >= plan.last:
            return


def _record(message: Message) -> LoggedRecord:
    return LoggedRecord(offset_of(message), message.timestamp()[1], message.key(), message.value())


def _meter_before(tools: RepairTools, plan: LedgerPlan, appended_at: int) -> Meter:
    """A meter that stands right before the range and has seen what the ledger has below it."""
    log, codec = plan.log, RecordCodec("usage-event", tools.kafka.registry_url)
    before = (log.topic_id, log.partition, plan.first - 1)
    rows = tools.ledger.ask(repair_queries.row_summary, *before)
    newest = max(appended_at, rows.newest_appended_at if rows is not None else 0)
    since = max(0, newest - tools.metering.dedupe_horizon_ms)
    seen = SlicedIndex(SliceFiles.of(tools.metering))
    for page in tools.ledger.ask(queries.dedupe_pages, *before, since, SLICE_IDS_MAX):
        seen.add_all(*tools.ledger.ask(queries.dedupe_rows, log.topic_id, log.partition, page))
    meta = Meta(
        cluster_id=log.cluster_id,
        topic_id=log.topic_id,
        applied_offset=plan.first - 1,
        appended_at=rows.newest_appended_at if rows is not None else 0,
        watermark=0,
        lengths=plan.lengths,
        counters=Counters(first_offset=plan.first),
    )
    return Meter(
        log.partition, tools.metering, lambda value: event_from_record(codec.decode(value)), meta, seen
    )


def _require_equal(tools: RepairTools, evidence: Evidence, meta: Meta | None, plan: LedgerPlan) -> None:
    """With the missing rows the ledger must be what the state says, or, without a state, what was published.

    Raises:
        PartitionHalted: it would not.
    """
    log = plan.log
    where = (log.topic_id, log.partition, plan.applied)
    rows = tools.ledger.ask(queries.lifetime_totals, *where)
    for client, sums in plan.totals.items():
        _add(rows.setdefault(client, SkuTotal()), sums)
    expected: Mapping[str, SkuTotal] = evidence.statements.totals
    if meta is not None:
        expected = evidence.totals
    if different := different_totals(expected, rows):
        raise refused(
            log,
            f"with the {plan.missing} rows missing at offsets {plan.first}..{plan.last} the ledger would "
            f"still not be what was counted up to {plan.applied}: {'; '.join(different)}. None is inserted. "
            f"The log holds {log.start_offset}..{log.end_offset - 1}: rows from before that are in a copy of "
            f"the ledger alone; where the state is wrong: {repair_command('state', log.partition)}",
        )
    if meta is not None:
        _require_equal_windows(tools, evidence, meta, plan)
    _require_told_windows(tools, plan)


def _require_equal_windows(tools: RepairTools, evidence: Evidence, meta: Meta, plan: LedgerPlan) -> None:
    """The windows the state keeps, as an assignment would compare them."""
    partition = plan.log.partition
    kept = restored_meter(tools, partition, meta, evidence.state).kept_windows()
    if kept:
        since, _ = min(kept)
        where = (plan.log.topic_id, partition, plan.applied)
        rows = tools.ledger.ask(queries.kept_windows, *where, since, meta.lengths)
        sums = {(start, client, sku): SkuTotal(*totals) for start, client, sku, *totals in rows}
        for key, missing in plan.windows.items():
            _add(sums.setdefault(key, SkuTotal()), missing)
        check_windows(kept, [(*key, *astuple(total)) for key, total in sums.items()], meta, partition)


def _require_told_windows(tools: RepairTools, plan: LedgerPlan) -> None:
    """The windows that the rows fall into, as they were published, also where the state has forgotten them.

    A copy whose first is lost, too, and not in the range, would be taken for it: the same credits, in another
    window.

    Raises:
        PartitionHalted: one of them would not be what was published.
    """
    if not plan.missing:
        return
    log, starts = plan.log, [start for start, _ in plan.last_offsets]
    where = (log.topic_id, log.partition)
    told = tools.ledger.ask(repair_queries.told_windows, *where, min(starts), max(starts))
    # Where a row is behind the newest snapshot that is known, the next one is verified by billing itself.
    windows = [
        (WindowRef(client, start, plan.lengths.end_of(start), *where), told[start, client][0])
        for (start, client), last in plan.last_offsets.items()
        if (start, client) in told and last <= told[start, client][0]
    ]
    sums = tools.ledger.ask(queries.window_sums, windows)
    by_window = {(ref.start, ref.client_id): skus for (ref, _), skus in zip(windows, sums, strict=True)}
    for (start, client, sku), missing in plan.windows.items():
        if (skus := by_window.get((start, client))) is not None:
            _add(skus.setdefault(sku, SkuTotal()), missing)
    for (start, client), skus in sorted(by_window.items()):
        cutoff, published = told[start, client]
        if skus != published:
            raise refused(
                log,
                f"with the {plan.missing} rows missing at offsets {plan.first}..{plan.last} the window "
                f"{start} of client {client} would be {skus} up to offset {cutoff}, and {published} was "
                "published. None is inserted. Another row, of before or behind the range, is missing in its "
                "place: widen it, or restore the rows from a copy",
            )


def _add(sums: SkuTotal, more: SkuTotal) -> None:
    sums.count += more.count
    sums.credits_micro += more.credits_micro
    sums.free_count += more.free_count
    sums.free_credits_micro += more.free_credits_micro
