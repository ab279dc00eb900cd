"""Rows of the ledger that billing writes: `window_snapshots` and the steps in `usage_record_log`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meterline.domain.account_books import About, Step
from meterline.domain.accounts import AccountKey
from meterline.domain.windows import WindowRef, WindowSnapshot
from meterline.ledger.tables import USAGE_RECORD_LOG_COLUMNS

__all__ = ["log_columns", "snapshot_columns", "step_row", "unsent_row", "window_row"]

NOT_SENT = "not_sent"
"""State of an advance whose credits never reach Stripe."""

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


def step_row(step: Step, map_version: int, now_ms: int) -> tuple[Any, ...]:
    """A step of the accounts. One of a usage record has all its facts: each step can be read alone."""
    key, about = step.account, step.about
    facts: dict[str, Any] = {
        "recorded_at": now_ms,
        "kind": step.kind,
        "client_id": key.client_id,
        "meter": key.meter,
        "map_version": map_version,
        "period_start": key.period_start,
        "period_end": key.period_end,
        "window_id": about.window_id,
        "window_start": about.start,
        "window_end": about.end,
        "source_topic_id": about.source_topic_id,
        "source_partition": about.source_partition,
        "cutoff_offset": about.cutoff_offset,
        "credits_micro": step.credits_micro,
        "stripe_customer": key.customer,
        "value": step.value,
        "state": step.state,
        "reason": step.reason,
        "request_id": step.request_id,
        "detail": step.detail,
    }
    if (record := step.record) is not None:
        facts["identifier"] = record.identifier
        facts["map_version"] = record.map_version
        if step.kind != "advance":
            facts |= {
                "event_name": record.event_name,
                "event_timestamp": record.event_timestamp,
                "idempotency_key": record.idempotency_key,
                "first_attempt_at": record.first_attempt_at or 0,
            }
    return _row(facts)


def unsent_row(
    now_ms: int, about: About, key: AccountKey, credits_micro: int, *, map_version: int, reason: str
) -> tuple[Any, ...]:
    """Credits that are metered and never reach Stripe; no account absorbs them."""
    step = Step("advance", key, about, credits_micro, state=NOT_SENT, reason=reason)
    return step_row(step, map_version, now_ms)


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
