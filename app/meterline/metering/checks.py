"""What halts a partition: state, log and ledger that don't tell one story at its start, and the brake.

Each text names the exact range and the command that repairs it, or what to do where no command can.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from meterline.domain.events import FUTURE_MAX_MS
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SkuTotal
from meterline.errors import PartitionHalted
from meterline.ledger.queries import KeptSum
from meterline.metering.meter import WindowKey
from meterline.metering.state import Counters, Meta
from meterline.settings import MeteringSettings
from meterline.streaming.owner import LogRange

__all__ = [
    "check_flood",
    "check_log",
    "check_range",
    "check_windows",
    "first_meta",
    "lengths_asked_for",
    "repair_command",
]

DIFFERENCES_SHOWN_MAX = 5


def first_meta(log: LogRange, in_ledger: tuple[int, int, int] | None, settings: MeteringSettings) -> Meta:
    """Where a partition stands that nobody has ever owned: right before its oldest record.

    Raises:
        PartitionHalted: the ledger has rows of it, so somebody has, and the state is lost.
    """
    if in_ledger is not None:
        count, first, last = in_ledger
        raise _halted(
            log,
            f"the ledger has {count} events at offsets {first}..{last}, but the changelog has no state: it "
            "was deleted or belongs to another cluster. Counting again could bill twice. To rebuild the "
            f"state from the ledger: {repair_command('state', log.partition)}",
        )
    return Meta(
        cluster_id=log.cluster_id,
        topic_id=log.topic_id,
        applied_offset=log.start_offset - 1,
        appended_at=0,
        watermark=0,
        lengths=WindowLengths.of(settings.window_length_ms, settings.window_length_since_ms),
        counters=Counters(first_offset=log.start_offset),
    )


def check_range(meta: Meta, log: LogRange) -> None:
    """The state must belong to this log, and the log must still hold what comes next.

    Raises:
        PartitionHalted: with the exact range.
    """
    following = meta.applied_offset + 1
    gap = following, log.start_offset - 1
    if meta.topic_id != log.topic_id:
        raise _halted(
            log,
            f"the topic was re-created: the state is of topic id {meta.topic_id} up to offset "
            f"{meta.applied_offset}, the topic is now {log.topic_id} with offsets "
            f"{log.start_offset}..{log.end_offset - 1}. To publish what was counted of the old one and begin "
            f"the new one: {repair_command('state', log.partition)}",
        )
    if following < log.start_offset:
        raise _halted(
            log,
            f"offsets {gap[0]}..{gap[1]} are gone from the log and were never counted "
            "(retention passed while no worker ran). Publish them again from their source where you can. To "
            f"go on without them: {repair_command('state', log.partition, gap)}",
        )
    if following > log.end_offset:
        raise _halted(
            log,
            f"offsets {log.end_offset}..{meta.applied_offset} were counted, but the log ends at "
            f"{log.end_offset - 1}: it was truncated, and new records would get offsets that count as taken. "
            f"Restore the log, or fill it up: {repair_command('log', log.partition)}",
        )


def check_log(meta: Meta, log: LogRange, settings: MeteringSettings) -> None:
    """State and log belong together, and these settings go on with the state.

    Raises:
        PartitionHalted: with the exact range, or what was changed.
    """
    check_range(meta, log)
    lengths_asked_for(meta, log, settings)


def lengths_asked_for(meta: Meta, log: LogRange, settings: MeteringSettings) -> WindowLengths:
    """How long windows are from now on: as they were, unless the settings ask for something newer.

    A worker whose setting is older than what stands in the state goes on with that. A change begins where no
    event can be yet: records are refused that are further ahead of their append time.

    Raises:
        PartitionHalted: two lengths are asked for from the same time on, or the change can't be made.
    """
    length_ms, since = settings.window_length_ms, settings.window_length_since_ms
    newest = meta.lengths.newest
    if since < newest.since or length_ms == newest.length_ms:
        return meta.lengths
    if since == newest.since:
        raise _halted(
            log,
            f"its windows are {newest.length_ms} ms long, the setting says {length_ms}. "
            f"Set METERLINE_METERING__WINDOW_LENGTH_MS={newest.length_ms}; or, if they are to become "
            f"{length_ms} ms long, say from when on: METERLINE_METERING__WINDOW_LENGTH_SINCE",
        )
    try:
        return meta.lengths.changed(length_ms, since, meta.appended_at + FUTURE_MAX_MS + 1)
    except ValueError as error:
        raise _halted(
            log, f"the length of its windows can't be changed to {length_ms} ms: {error}"
        ) from error


def check_windows(
    kept: Mapping[WindowKey, Mapping[str, SkuTotal]],
    in_ledger: Collection[KeptSum],
    meta: Meta,
    partition: int,
) -> None:
    """Every kept window must equal the ledger's sums up to the applied offset.

    Args:
        kept: by window, SKU -> totals.
        in_ledger: sums of these windows, each once, and of others that are kept no more.

    Raises:
        PartitionHalted: naming the windows that differ.
    """
    sums = sum(map(len, kept.values()))
    if sums == _count_equal(kept, in_ledger):
        return
    said = {(start, client, sku): SkuTotal(*totals) for start, client, sku, *totals in in_ledger}
    different = sorted(
        (start, client, sku, total)
        for (start, client), skus in kept.items()
        for sku, total in skus.items()
        if said.get((start, client, sku)) != total
    )
    shown = "; ".join(
        f"client {client}, SKU {sku}, window {start}: state {total}, ledger {said.get((start, client, sku))}"
        for start, client, sku, total in different[:DIFFERENCES_SHOWN_MAX]
    )
    raise PartitionHalted(
        f"partition {partition}: up to offset {meta.applied_offset} the ledger and the state differ in "
        f"{len(different)} of {sums} sums: {shown}. Where rows are missing: "
        f"{repair_command('ledger', partition)}. Where the ledger is right: "
        f"{repair_command('state', partition)}. Each refuses where it would be wrong"
    )


def _count_equal(kept: Mapping[WindowKey, Mapping[str, SkuTotal]], in_ledger: Iterable[KeptSum]) -> int:
    """How many are the same in both. No object is made of any: there may be a million."""
    equal = 0
    for start, client, sku, count, credits_micro, free_count, free_credits_micro in in_ledger:
        skus = kept.get((start, client))
        total = skus.get(sku) if skus is not None else None
        if total is not None:
            equal += (
                total.credits_micro == credits_micro
                and total.count == count
                and total.free_count == free_count
                and total.free_credits_micro == free_credits_micro
            )
    return equal


def check_flood(flood: str, log: LogRange) -> None:
    """Many clients' records are dead letters: none of them is sent, they stay in the log.

    Raises:
        PartitionHalted: what was found and what can be done.
    """
    if flood:
        raise _halted(
            log,
            f"{flood}: rather a wrong deployment than wrong records. They stay in the log, only earlier ones "
            "were sent to usage.events.dlq. Mend the cause (a schema this version doesn't know: upgrade) and "
            "restart: they are read again. If they are wrong for good, let them pass with "
            "METERLINE_METERING__BRAKE_DEAD_LETTERS_MAX=1000 and a restart, and set it back after them",
        )


def repair_command(what: str, partition: int, gap: tuple[int, int] | None = None) -> str:
    """What a person types; only the reason is theirs."""
    accepted = f" --accept-gap {gap[0]}..{gap[1]}" if gap else ""
    return f"meterline repair {what} {partition}{accepted} --reason WHY"


def _halted(log: LogRange, why: str) -> PartitionHalted:
    return PartitionHalted(f"{log.topic}-{log.partition}: {why}")
