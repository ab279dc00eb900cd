"""Rows for the ledger's tables, made from the few columns a test cares about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from clickhouse_driver import Client as ClickHouse

from meterline.domain.windows import WindowRef
from meterline.ledger.tables import EVENT_COLUMNS, EVENTS, USAGE_RECORD_LOG_COLUMNS, WINDOW_SNAPSHOT_COLUMNS

__all__ = ["HOUR_MS", "NOON", "columns_of", "dedupe_columns", "event", "insert_events", "snapshot", "step"]

HOUR_MS = 3_600_000
NOON = 1_795_521_600_000
"""2026-11-24 12:00 UTC."""

EVENT = {
    "topic_id": "topic",
    "partition": 0,
    "client_id": "acme",
    "correlation_id": "task",
    "sku": "gpu",
    "credits_micro": 1_000_000,
    "billable": True,
    "occurred_at": NOON,
    "source": "test",
    "attributes": {},
    "reservation_id": None,
    "corrects_event_id": "",
    "corrects_kind": "",
    "corrects_topic_id": "",
    "corrects_partition": 0,
    "corrects_offset": 0,
}


def event(offset: int, **values: Any) -> dict[str, Any]:
    """One row of `events`; appended a second after it occurred."""
    row = EVENT | {"offset": offset, "event_id": f"event-{offset}"} | values
    own = {
        "appended_at": row["occurred_at"] + 1_000,
        "identity_hash": (1 << 95) + offset,
        "payload_digest": (1 << 63) + offset,
    }
    return own | row


def dedupe_columns(rows: Iterable[Mapping[str, Any]]) -> tuple[Any, Any, Any, Any]:
    """What `ledger.queries.dedupe_rows` answers of rows of `events`."""
    ids = [(row["identity_hash"], row["payload_digest"], row["appended_at"]) for row in rows]
    columns = [[identity % 2**64, identity >> 64, digest, at] for identity, digest, at in ids]
    low, high, digests, appended_at = np.array(columns, np.uint64).reshape(len(ids), 4).T.copy()
    return low, high, digests, appended_at


def snapshot(start: int, cutoff_offset: int, skus: dict[str, int], **values: Any) -> dict[str, Any]:
    """One row of `window_snapshots` of an hour: SKU -> billable micro-credits, one event each."""
    row = {
        "client_id": "acme",
        "window_start": start,
        "window_end": start + HOUR_MS,
        "topic_id": "topic",
        "partition": 0,
        "cutoff_offset": cutoff_offset,
        "skus": list(skus),
        "counts": [1] * len(skus),
        "credits_micro": list(skus.values()),
        "free_counts": [0] * len(skus),
        "free_credits_micro": [0] * len(skus),
        "closed_at": start + HOUR_MS + 10,
        "watermark": start + HOUR_MS,
        "log_topic_id": "windows-topic",
        "log_partition": 0,
        "log_offset": cutoff_offset,
    } | values
    where = (row["client_id"], row["window_start"], row["window_end"], row["topic_id"], row["partition"])
    return {"window_id": WindowRef(*where).window_id} | row


def step(seq: int, kind: str, **values: Any) -> dict[str, Any]:
    """One row of `usage_record_log`."""
    empty = dict.fromkeys(USAGE_RECORD_LOG_COLUMNS, "")
    row = {
        "log_id": "windows-topic",
        "partition": 0,
        "seq": seq,
        "generation": 1,
        "recorded_at": NOON + HOUR_MS + seq,
        "kind": kind,
        "client_id": "acme",
        "meter": "credits",
        "map_version": 1,
        "period_start": NOON - 12 * HOUR_MS,
        "period_end": NOON + 12 * HOUR_MS,
        "window_id": "window",
        "window_start": NOON,
        "window_end": NOON + HOUR_MS,
        "source_topic_id": "topic",
        "source_partition": 0,
        "cutoff_offset": 10,
        "credits_micro": 0,
        "value": 0,
        "event_timestamp": 0,
        "first_attempt_at": 0,
    }
    return empty | row | values


def columns_of(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """The columns in the order in which they are inserted, and their values."""
    tables = (EVENT_COLUMNS, WINDOW_SNAPSHOT_COLUMNS, USAGE_RECORD_LOG_COLUMNS)
    (names,) = [names for names in tables if set(names) == set(rows[0])]
    return names, [[row[name] for row in rows] for name in names]


def insert_events(ledger: ClickHouse, rows: list[dict[str, Any]]) -> None:
    """Rows of `events` to a ledger; acknowledged when it returns."""
    names, columns = columns_of(rows)
    listed = ", ".join(f"`{name}`" for name in names)
    ledger.execute(f"INSERT INTO {EVENTS} ({listed}) VALUES", columns, columnar=True)
