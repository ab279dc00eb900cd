"""Rows of the ledger that billing writes: `window_snapshots` and the steps in `usage_record_log`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meterline.domain.billing import AccountKey
from meterline.domain.usage_records import UsageRecord
from meterline.domain.windows import WindowRef, WindowSnapshot
from meterline.ledger.tables import USAGE_RECORD_LOG_COLUMNS

__all__ = ["advance_row", "log_columns", "record_row", "snapshot_columns", "window_row"]

_STEP_COLUMNS = USAGE_RECORD_LOG_COLUMNS[4:]
"""Without log_id, partition and seq, which say where the row stands, and generation: a step is committed in
the changelog before it is inserted, so no two owners ever write different steps under one seq."""
_TEXTS = frozenset(
    {
        "kind",
        "client_id",
        "meter",
        "window_id",
        "source_topic_id",
        "identifier",
        "event_name",
        "stripe_customer",
        "idempotency_key",
        "state",
        "reason",
        "request_id",
        "detail",
    }
)
_EMPTY: dict[str, Any] = {column: "" if column in _TEXTS else 0 for column in _STEP_COLUMNS}


def advance_row(
    now_ms: int,
    ref: WindowRef,
    cutoff_offset: int,
    key: AccountKey,
    credits_micro: int,
    **facts: Any,
) -> tuple[Any, ...]:
    """A snapshot was absorbed by an account: by how much its credits changed. Written also for 0 units."""
    return _row(
        facts
        | _window_facts(ref, cutoff_offset)
        | {
            "recorded_at": now_ms,
            "kind": "advance",
            "meter": key.meter,
            "map_version": key.map_version,
            "period_start": key.period_start,
            "period_end": key.period_end,
            "credits_micro": credits_micro,
        }
    )


def record_row(kind: str, now_ms: int, record: UsageRecord, **facts: Any) -> tuple[Any, ...]:
    """A step of a usage record: `record`, `attempt`, `outcome` or `held`. All its facts, so that each step
    can be read alone.
    """  # noqa: D205 - one sentence that needs two lines
    return _row(
        {
            "recorded_at": now_ms,
            "kind": kind,
            "client_id": record.client_id,
            "meter": record.meter,
            "map_version": record.map_version,
            "period_start": record.period_start,
            "period_end": record.period_end,
            "window_id": record.window_id,
            "window_start": record.window_start,
            "window_end": record.window_end,
            "source_topic_id": record.source_topic_id,
            "source_partition": record.source_partition,
            "cutoff_offset": record.cutoff_offset,
            "identifier": record.identifier,
            "event_name": record.event_name,
            "stripe_customer": record.customer,
            "value": record.value,
            "event_timestamp": record.event_timestamp,
            "idempotency_key": record.idempotency_key,
            "state": record.state.value,
            "reason": record.held_reason,
            "first_attempt_at": record.first_attempt_at or 0,
        }
        | facts
    )


def window_row(
    kind: str, now_ms: int, ref: WindowRef, cutoff_offset: int, *, credits_micro: int, reason: str
) -> tuple[Any, ...]:
    """A snapshot is `held` or `released` as a whole, before it is known on which meters it counts."""
    return _row(
        _window_facts(ref, cutoff_offset)
        | {
            "recorded_at": now_ms,
            "kind": kind,
            "credits_micro": credits_micro,
            "state": kind,
            "reason": reason,
        }
    )


def log_columns(log_id: str, partition: int, rows: Mapping[int, Sequence[Any]]) -> list[Sequence[Any]]:
    """The columns of usage_record_log for rows by seq; at least one row."""
    count = len(rows)
    return [
        [log_id] * count,
        [partition] * count,
        list(rows),
        [0] * count,
        *zip(*rows.values(), strict=True),
    ]


def snapshot_columns(
    log_id: str, partition: int, snapshots: Iterable[tuple[int, WindowSnapshot]]
) -> list[Sequence[Any]]:
    """The columns of window_snapshots for snapshots with their offset in usage.windows; at least one."""
    rows = []
    for offset, snapshot in snapshots:
        ref, totals = snapshot.ref, snapshot.skus.values()
        rows.append(
            (
                ref.window_id,
                ref.client_id,
                ref.start,
                ref.end,
                ref.topic_id,
                ref.partition,
                snapshot.cutoff_offset,
                list(snapshot.skus),
                [total.count for total in totals],
                [total.credits_micro for total in totals],
                [total.free_count for total in totals],
                [total.free_credits_micro for total in totals],
                snapshot.closed_at,
                snapshot.watermark,
                log_id,
                partition,
                offset,
            )
        )
    return list(zip(*rows, strict=True))


def _window_facts(ref: WindowRef, cutoff_offset: int) -> dict[str, Any]:
    return {
        "client_id": ref.client_id,
        "window_id": ref.window_id,
        "window_start": ref.start,
        "window_end": ref.end,
        "source_topic_id": ref.topic_id,
        "source_partition": ref.partition,
        "cutoff_offset": cutoff_offset,
    }


def _row(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """In column order; a fact that is no column is a mistake here, not a missing value there."""
    if unknown := facts.keys() - _EMPTY.keys():
        raise KeyError(f"no such column of usage_record_log: {sorted(unknown)}")
    return tuple((_EMPTY | dict(facts)).values())
