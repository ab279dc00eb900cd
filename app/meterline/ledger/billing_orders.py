"""What persons order of billing, and why: one row, written by the command, read by the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from meterline.ledger.client import Client, ledger_errors
from meterline.ledger.tables import BILLING_ORDER_LOG, BILLING_ORDER_LOG_COLUMNS

__all__ = ["SWITCHES", "BillingOrder", "newest_switches", "orders_since", "write_order"]

SWITCHES = ("pause", "resume", "shadow")
"""Orders that say how sending stands from now on: the newest one holds."""


@dataclass(frozen=True, slots=True)
class BillingOrder:
    """One row of `billing_order_log`, in the order of its columns.

    Attributes:
        order_id: its identity; chosen once.
        ordered_at: ms.
        action: release or resolve, or one of `SWITCHES`.
        client_id: "": all clients.
        target: identifier of a record, or id of an account; "" for switches.
        value: resolve: units the invoice charges.
    """

    order_id: str
    ordered_at: int
    action: str
    client_id: str = ""
    target: str = ""
    value: int = 0
    ordered_by: str = ""
    reason: str = ""


assert tuple(field.name for field in fields(BillingOrder)) == BILLING_ORDER_LOG_COLUMNS


def write_order(client: Client, order: BillingOrder) -> None:
    """Store the row; returns when ClickHouse has acknowledged it. Again is harmless.

    Raises:
        RetryLater, LedgerNotMigrated, WorkerMustExit: see `ledger.client.ledger_errors`.
    """
    columns = ", ".join(f"`{name}`" for name in BILLING_ORDER_LOG_COLUMNS)
    with ledger_errors():
        client.execute(f"INSERT INTO {BILLING_ORDER_LOG} ({columns}) VALUES", [astuple(order)])


def newest_switches(client: Client) -> Mapping[str, str]:
    """The newest switch for each client; '' for all."""
    with ledger_errors():
        rows = client.execute(
            "SELECT client_id, argMax(action, (ordered_at, order_id)) FROM billing_order_log"
            " WHERE action IN %(switches)s GROUP BY client_id",
            {"switches": SWITCHES},
        )
    return dict(rows)


def orders_since(client: Client, ordered_at: int) -> Sequence[BillingOrder]:
    """Orders about records and accounts since a moment (ms), oldest first."""
    with ledger_errors():
        rows = client.execute(
            "SELECT order_id, toUnixTimestamp64Milli(ordered_at), action, client_id, target, value,"
            " ordered_by, reason FROM billing_order_log FINAL"
            " WHERE action NOT IN %(switches)s AND ordered_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC')"
            " ORDER BY ordered_at, order_id",
            {"switches": SWITCHES, "since": ordered_at},
        )
    return [BillingOrder(*row) for row in rows]
