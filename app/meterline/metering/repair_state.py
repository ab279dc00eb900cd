"""The state of a partition, computed anew from its ledger rows as of an offset.

One mechanism for a lost changelog, a wrong one, a gap in the log and a topic that was made again: choose the
offset as of which the state is to be, and let the ledger say what it is. The offset is always one up to which
everything was committed (META, or the newest statement that was published), so that the worker which goes on
behind it takes every later record exactly once: rows it inserted before are the same rows again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from meterline.contracts.codec import RecordCodec
from meterline.contracts.topics import METERING_CHANGELOG, USAGE_EVENTS
from meterline.errors import PartitionHalted, RetryLater
from meterline.ledger import queries, repair_queries
from meterline.metering.checks import check_log, check_windows, first_meta, repair_command
from meterline.metering.meter import Meter
from meterline.metering.outputs import progress_output, total_output, window_output
from meterline.metering.repair_evidence import (
    Evidence,
    RepairTools,
    different_totals,
    lengths_that_were,
    refused,
    require_whole_ledger,
    restored_meter,
)
from meterline.metering.state import (
    GROUP,
    Counters,
    Meta,
    aggregate_key,
    aggregate_value,
    brake_key,
    meta_key,
    published_value,
    total_key,
    total_value,
    window_key,
)
from meterline.settings import KafkaSettings
from meterline.streaming.owner import Commit, LogRange, Output
from meterline.streaming.transactions import FencedProducer, transactional_client, transactional_id_of

__all__ = ["StatePlan", "commit_as_owner", "plan_state"]

OFFSET_MAX = 2**63 - 1

Gap = tuple[int, int]
"""First and last offset that are gone from the log."""


@dataclass(frozen=True, slots=True)
class StatePlan:
    """What a repair of the state will commit.

    Attributes:
        why: what is wrong, in one sentence.
        meta: where the partition stands afterwards.
        changelog: what changes of its state.
        outputs: what was counted of an older topic and is not published yet.
    """

    log: LogRange
    why: str
    meta: Meta
    changelog: Sequence[tuple[bytes, bytes | None]]
    outputs: Sequence[Output] = ()


def plan_state(tools: RepairTools, evidence: Evidence, gap: Gap | None) -> StatePlan | None:
    """What is to be committed so that the checks of an assignment pass; None: they do already.

    Args:
        gap: offsets of which a person accepts that they will never be counted.

    Raises:
        PartitionHalted: nothing that could be committed would be right; the text says what to do first.
    """
    log, saved = evidence.log, evidence.state.get(meta_key(evidence.log.partition))
    if saved is None:
        return _plan_lost(tools, evidence, gap)
    meta = Meta.from_bytes(saved).brought_up_to_date(log.end_offset)
    if meta.topic_id != log.topic_id:
        return _plan_new_topic(tools, evidence, meta, gap)
    _require_counted_rows(tools, log, meta)
    require_whole_ledger(tools, evidence)
    agrees = _agrees(tools, evidence, meta)
    applied = _applied_after(log, meta.applied_offset, gap)
    if agrees and gap is None:
        check_log(meta, log, tools.metering)
        return None
    why = f"offsets {gap[0]}..{gap[1]} are never counted" if gap else "the state differs from the ledger"
    return _rebuilt(tools, evidence, meta, applied, why, keep_published=agrees)


def _plan_lost(tools: RepairTools, evidence: Evidence, gap: Gap | None) -> StatePlan | None:
    """There is no META: how far the partition was is what the newest committed statement says."""
    log, said = evidence.log, evidence.statements
    rows = tools.ledger.ask(repair_queries.row_summary, log.topic_id, log.partition, OFFSET_MAX)
    if rows is None:
        return None
    if said.committed_until < 0:
        raise refused(
            log,
            f"the ledger has {rows.count} events at offsets {rows.first_offset}..{rows.last_offset}, but "
            "neither the changelog nor usage.totals says how far they were counted. Restore one of the two",
        )
    require_whole_ledger(tools, evidence)
    first = min(rows.first_offset, log.start_offset, *said.dead)
    meta = Meta(
        cluster_id=log.cluster_id,
        topic_id=log.topic_id,
        applied_offset=said.committed_until,
        appended_at=0,
        watermark=0,
        lengths=lengths_that_were(tools, log),
        # What became of each offset is lost with the state; `_rebuilt` fills in what the ledger knows.
        counters=Counters(
            first_offset=first,
            dead_letters=len(said.dead),
            unknown=said.committed_until + 1 - first - len(said.dead),
        ),
        published_until=said.published_until,
        accounted_until=said.accounted_until,
    )
    applied = _applied_after(log, meta.applied_offset, gap)
    return _rebuilt(tools, evidence, meta, applied, "the changelog has no state", keep_published=True)


def _plan_new_topic(tools: RepairTools, evidence: Evidence, meta: Meta, gap: Gap | None) -> StatePlan:
    """Publish all that was counted of the topic that is gone, then begin the one that is there."""
    log, ledger = evidence.log, tools.ledger
    if gap is not None:
        raise refused(log, "the topic was re-created, which is no gap: leave --accept-gap out")
    if (in_ledger := ledger.ask(queries.partition_offsets, log.topic_id, log.partition)) is not None:
        raise refused(
            log,
            f"the state is of topic id {meta.topic_id}, and yet the ledger has {in_ledger[0]} events of the "
            f"new one, {log.topic_id}: the changelog is older than they are. Restore its newest state",
        )
    _require_counted_rows(tools, log, meta)
    begun = first_meta(log, None, tools.metering)
    place = meta_key(log.partition)
    changelog: list[tuple[bytes, bytes | None]] = [(key, None) for key in evidence.state if key != place]
    changelog.append((place, begun.to_bytes()))
    why = f"the topic was re-created: topic id {meta.topic_id} is counted up to offset {meta.applied_offset}"
    return StatePlan(log, why, begun, changelog, _last_statements(tools, evidence, meta))


def _last_statements(tools: RepairTools, evidence: Evidence, meta: Meta) -> list[Output]:
    """Every window and total of a topic that is gone, as of the last offset that was counted of it."""
    meter = restored_meter(tools, evidence.log.partition, meta, evidence.state)
    _check_kept(tools, meter, meta)
    ends = [meter.end_of(start) for start, _ in meter.windows]
    meter.advance_watermark(max(ends, default=0) + tools.metering.grace_ms)
    flush = meter.build_flush(time.time_ns() // 1_000_000)
    if flush is None:
        return []
    registry = tools.kafka.registry_url
    windows, totals = RecordCodec("usage-window", registry), RecordCodec("usage-total", registry)
    outputs = [window_output(snapshot, windows, tools.window_partitions) for snapshot in flush.snapshots]
    outputs += [total_output(total, totals) for total in flush.totals]
    if flush.progress is not None:
        outputs.append(progress_output(flush.progress, RecordCodec("usage-progress", registry)))
    return outputs


def _require_counted_rows(tools: RepairTools, log: LogRange, meta: Meta) -> None:
    """As many rows as were accepted: with fewer the state would forget usage, with more bill it twice."""
    until = meta.applied_offset
    rows = tools.ledger.ask(repair_queries.row_summary, meta.topic_id, log.partition, until)
    count = rows.count if rows is not None else 0
    accepted = meta.counters.accepted
    if count < accepted:
        first = (
            f"First: {repair_command('ledger', log.partition)}"
            if meta.topic_id == log.topic_id
            else "Its log is gone: restore the rows from a copy"
        )
        raise refused(
            log,
            f"up to offset {until} the ledger lacks {accepted - count} of {accepted} accepted events. "
            f"{first}",
        )
    if count > accepted:
        raise refused(
            log,
            f"up to offset {until} the ledger has {count} events, {count - accepted} more than were "
            "accepted: something else added rows to it. Remove them first",
        )


def _applied_after(log: LogRange, applied: int, gap: Gap | None) -> int:
    """The last offset that counts as taken: the one given, or the end of the accepted gap.

    Raises:
        PartitionHalted: the log and what is accepted don't fit together; the text names the exact range.
    """
    if applied + 1 > log.end_offset:
        raise refused(
            log,
            f"offsets {log.end_offset}..{applied} were counted, but the log ends at {log.end_offset - 1}. "
            f"Restore the log, or fill it up: {repair_command('log', log.partition)}",
        )
    if applied + 1 >= log.start_offset:
        if gap is not None:
            raise refused(
                log,
                f"there is no gap to accept: offsets up to {applied} are counted, and the log holds "
                f"{log.start_offset}..{log.end_offset - 1}",
            )
        return applied
    found = (applied + 1, log.start_offset - 1)
    if gap != found:
        raise refused(
            log,
            f"offsets {found[0]}..{found[1]} are gone from the log and were never counted. To go on without "
            f"exactly these: {repair_command('state', log.partition, found)}",
        )
    return found[1]


def _rebuilt(
    tools: RepairTools, evidence: Evidence, meta: Meta, applied: int, why: str, *, keep_published: bool
) -> StatePlan:
    """The state as of an offset, from the ledger; checked as an assignment would check it.

    Args:
        keep_published: windows that stand published in the ledger are not published again. False where
            what was published may be wrong.
    """
    log, ledger = evidence.log, tools.ledger
    where = (log.topic_id, log.partition, applied)
    rows = ledger.ask(repair_queries.row_summary, *where)
    accepted = rows.count if rows is not None else 0
    before, gone = meta.counters, applied - meta.applied_offset
    counters = replace(
        before, accepted=accepted, unknown=before.unknown + gone - (accepted - before.accepted)
    )
    watermark = appended_at = 0
    if rows is not None:
        watermark = rows.newest_occurred_at - tools.metering.allowed_lateness_ms
        appended_at = rows.newest_appended_at
    meta = replace(
        meta,
        applied_offset=applied,
        watermark=max(meta.watermark, watermark),
        appended_at=max(meta.appended_at, appended_at),
        counters=counters,
    )
    state = _state_from_rows(tools, where, meta, keep_published=keep_published)
    state[meta_key(log.partition)] = meta.to_bytes()
    if (brake := evidence.state.get(brake_key(log.partition))) is not None:
        state[brake_key(log.partition)] = brake  # a repair lets no flood pass
    check_log(meta, log, tools.metering)
    _check_kept(tools, restored_meter(tools, log.partition, meta, state), meta)
    changelog: list[tuple[bytes, bytes | None]] = [
        (key, None) for key in evidence.state.keys() - state.keys()
    ]
    changelog += [(key, value) for key, value in state.items() if evidence.state.get(key) != value]
    return StatePlan(log, why, meta, changelog)


def _state_from_rows(
    tools: RepairTools, where: tuple[str, int, int], meta: Meta, *, keep_published: bool
) -> dict[bytes, bytes]:
    """Windows and totals. What billing has written to the ledger counts as published, the rest is again."""
    ask, partition = tools.ledger.ask, where[1]
    state: dict[bytes, bytes] = {}
    kept_since = meta.watermark - tools.metering.keep_closed_windows_ms
    windows = ask(repair_queries.state_windows, *where, meta.lengths, kept_since)
    for (start, client), window in windows.items():
        for sku, total in window.skus.items():
            state[aggregate_key(partition, start, client, sku)] = aggregate_value(total)
        if keep_published and window.published_cutoff >= 0:
            published = published_value(window.published_cutoff, window.last_offset)
            state[window_key(partition, start, client)] = published
    for client, (sums, last_offset) in ask(repair_queries.client_totals, *where).items():
        state[total_key(partition, client)] = total_value(sums, last_offset)
    return state


def _agrees(tools: RepairTools, evidence: Evidence, meta: Meta) -> bool:
    """Whether the state says of its windows and of its clients what the ledger says."""
    log = evidence.log
    rows = tools.ledger.ask(queries.lifetime_totals, log.topic_id, log.partition, meta.applied_offset)
    if different_totals(evidence.totals, rows):
        return False
    try:
        _check_kept(tools, restored_meter(tools, log.partition, meta, evidence.state), meta)
    except PartitionHalted:
        return False
    return True


def _check_kept(tools: RepairTools, meter: Meter, meta: Meta) -> None:
    kept = meter.kept_windows()
    if kept:
        since, _ = min(kept)
        where = (meta.topic_id, meter.partition, meta.applied_offset)
        rows = tools.ledger.ask(queries.kept_windows, *where, since, meta.lengths)
        check_windows(kept, rows, meta, meter.partition)


def commit_as_owner(
    kafka: KafkaSettings, partition: int, make_plan: Callable[[], StatePlan | None]
) -> StatePlan | None:
    """Fence whoever owns the partition, plan upon what is committed then, and commit it all at once.

    A worker that runs there ends itself at its next commit. One that takes the partition over meanwhile
    makes this commit fail.

    Raises:
        PartitionHalted: as `plan_state`; nothing was changed.
        RetryLater: the commit was refused or its outcome is not known. Again: it begins with what is there.
    """
    return asyncio.run(_commit_as_owner(kafka, partition, make_plan))


async def _commit_as_owner(
    kafka: KafkaSettings, partition: int, make_plan: Callable[[], StatePlan | None]
) -> StatePlan | None:
    client = transactional_client(kafka, transactional_id_of(GROUP, USAGE_EVENTS, partition))
    producer = FencedProducer(client, METERING_CHANGELOG, partition)
    await producer.start()
    try:
        plan = await asyncio.to_thread(make_plan)
        if plan is not None:
            try:
                await producer.transact(Commit(plan.changelog, plan.outputs, plan.meta.applied_offset))
            except Exception as error:  # whatever it is, what is committed says it
                raise RetryLater(
                    f"{USAGE_EVENTS}-{partition}: the commit was refused, or its outcome is not known "
                    f"({error!r}). A worker may have taken the partition over: stop it, and run this again"
                ) from error
    finally:
        await producer.stop()
    return plan
