"""What people ask the ledger about one client: usage by hour, and the receipt with every task.

Read from the stable views only, so each of these can be asked by hand too (docs/ledger.md). All functions
block and raise what `ledger.client.ledger_errors` raises. Periods are half-open and in UTC milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from meterline.domain.credits import MICRO
from meterline.ledger.client import Client, ledger_errors

__all__ = [
    "BillingState",
    "HourUsage",
    "Period",
    "ReceiptLine",
    "RecordState",
    "WindowState",
    "billing_states",
    "has_usage",
    "hours",
    "receipt_lines",
    "record_states",
    "window_states",
]

LINES_PER_BLOCK = 10_000
"""A receipt of millions of tasks is read in blocks of this size: a few megabytes at a time."""


@dataclass(frozen=True, slots=True)
class Period:
    """`[since_ms, until_ms)` in UTC."""

    since_ms: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class HourUsage:
    """One hour of one client in one SKU."""

    hour: datetime
    sku: str
    events: int
    credits_micro: int
    free_events: int
    free_credits_micro: int
    closed: bool


@dataclass(frozen=True, slots=True)
class ReceiptLine:
    """One task."""

    occurred_at: datetime
    sku: str
    credits_micro: int
    billable: bool
    correlation_id: str
    event_id: str
    corrects_event_id: str
    corrects_kind: str
    beyond_billing_horizon: bool


@dataclass(frozen=True, slots=True)
class WindowState:
    """A closed window as its latest snapshots have it, over all source partitions."""

    start: datetime
    end: datetime
    events: int
    credits_micro: int


@dataclass(frozen=True, slots=True)
class RecordState:
    """Where a usage record stands, or, with an empty identifier, an advance or a hold of a window."""

    window_start: datetime
    window_end: datetime
    meter: str
    credits_micro: int
    identifier: str
    stripe_customer: str
    value: int
    event_timestamp: datetime
    state: str
    reason: str
    attempts: int
    request_id: str


@dataclass(frozen=True, slots=True)
class BillingState:
    """How many usage records, windows and advances are in one state, for one reason.

    Attributes:
        client_id: "" where the clients are added up.
        state: "" for advances that made no whole unit.
        value: units; of accepted ones what Stripe has.
    """

    client_id: str
    state: str
    reason: str
    count: int
    credits_micro: int
    value: int
    oldest_window: datetime


def billing_states(client: Client, *, by_client: bool) -> list[BillingState]:
    """Where everything stands that billing took in."""
    who = "client_id" if by_client else "''"
    with ledger_errors():
        rows = client.execute(
            f"""
            SELECT {who} AS who, state, reason, count(), sum(credits), sum(value), min(window_start)
            FROM usage_records GROUP BY who, state, reason ORDER BY who, state, reason
            """  # noqa: S608 - one of the two constants above
        )
    return [
        BillingState(who, state, reason, count, _micro(charged), value, oldest)
        for who, state, reason, count, charged, value, oldest in rows
    ]


def has_usage(client: Client, client_id: str) -> bool:
    """Whether the ledger knows the client at all."""
    rows = _execute(client, "SELECT 1 FROM events WHERE client_id = %(client_id)s LIMIT 1", client_id)
    return bool(rows)


def hours(client: Client, client_id: str, period: Period) -> list[HourUsage]:
    """The hours that begin in the period, by hour and SKU."""
    rows = _execute(
        client,
        """
        SELECT hour, sku, events, credits, free_events, free_credits, closed
        FROM usage_by_hour
        WHERE client_id = %(client_id)s
          AND hour >= fromUnixTimestamp64Milli(%(since)s, 'UTC')
          AND hour < fromUnixTimestamp64Milli(%(until)s, 'UTC')
        ORDER BY hour, sku
        """,
        client_id,
        period,
    )
    return [
        HourUsage(hour, sku, events, _micro(charged), free_events, _micro(free), closed)
        for hour, sku, events, charged, free_events, free, closed in rows
    ]


def receipt_lines(client: Client, client_id: str, period: Period) -> Iterator[ReceiptLine]:
    """Every task that occurred in the period, in order of time; read while it is consumed.

    The client can do nothing else until the iterator is exhausted.
    """
    with ledger_errors():
        rows = client.execute_iter(
            """
            SELECT occurred_at, sku, credits_micro, billable, correlation_id, event_id,
                   corrects_event_id, corrects_kind, beyond_billing_horizon
            FROM usage
            WHERE client_id = %(client_id)s
              AND occurred_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC')
              AND occurred_at < fromUnixTimestamp64Milli(%(until)s, 'UTC')
            ORDER BY occurred_at, topic_id, `partition`, `offset`
            """,
            {"client_id": client_id, "since": period.since_ms, "until": period.until_ms},
            settings={"max_block_size": LINES_PER_BLOCK},
        )
        for row in rows:
            yield ReceiptLine(*row)


def window_states(client: Client, client_id: str, period: Period) -> list[WindowState]:
    """The closed windows that touch the period, in order of time."""
    rows = _execute(
        client,
        """
        SELECT window_start, window_end, sum(events), sum(credits)
        FROM windows
        WHERE client_id = %(client_id)s
          AND window_end > fromUnixTimestamp64Milli(%(since)s, 'UTC')
          AND window_start < fromUnixTimestamp64Milli(%(until)s, 'UTC')
        GROUP BY window_start, window_end
        ORDER BY window_start, window_end
        """,
        client_id,
        period,
    )
    return [WindowState(start, end, events, _micro(charged)) for start, end, events, charged in rows]


def record_states(client: Client, client_id: str, period: Period) -> list[RecordState]:
    """How the windows that touch the period reached Stripe, in order of the windows and of the log."""
    rows = _execute(
        client,
        """
        SELECT window_start, window_end, meter, credits, identifier, stripe_customer, value,
               event_timestamp, state, reason, attempts, request_id
        FROM usage_records
        WHERE client_id = %(client_id)s
          AND window_end > fromUnixTimestamp64Milli(%(since)s, 'UTC')
          AND window_start < fromUnixTimestamp64Milli(%(until)s, 'UTC')
        ORDER BY window_start, log_id, `partition`, last_seq
        """,
        client_id,
        period,
    )
    return [
        RecordState(start, end, meter, _micro(charged), *others)
        for start, end, meter, charged, *others in rows
    ]


def _micro(amount: Decimal) -> int:
    """The views give credits with six decimal places."""
    return int(amount * MICRO)


def _execute(client: Client, query: str, client_id: str, period: Period | None = None) -> list[Any]:
    parameters: dict[str, Any] = {"client_id": client_id}
    if period is not None:
        parameters |= {"since": period.since_ms, "until": period.until_ms}
    with ledger_errors():
        rows: list[Any] = client.execute(query, parameters)
    return rows
