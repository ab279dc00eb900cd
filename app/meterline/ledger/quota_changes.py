"""What a person did to credit buckets, and why: one row, written before it is done.

A row whose `detail` says no more than that it was ordered tells that the command was interrupted.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import Self

from meterline.ledger.client import Client, ledger_errors
from meterline.ledger.tables import QUOTA_CHANGE_LOG, QUOTA_CHANGE_LOG_COLUMNS

__all__ = ["ORDERED", "QuotaChange", "write_change"]

ORDERED = "ordered"
"""Detail of a change that was not carried out yet."""


@dataclass(frozen=True, slots=True)
class QuotaChange:
    """One row of `quota_change_log`, in the order of its columns.

    Attributes:
        change_id: with `changed_at` its identity; chosen once.
        changed_at: ms.
        action: void or rebuild.
        client_id: "": all clients.
        changed_by: a person or a program.
        detail: what came of it.
    """

    change_id: str
    changed_at: int
    action: str
    client_id: str = ""
    grant_id: str = ""
    reservation_id: str = ""
    credits_micro: int = 0
    changed_by: str = ""
    reason: str = ""
    detail: str = ORDERED

    def done(self, detail: str) -> Self:
        """The same change, with what came of it: its row replaces the former one."""
        return replace(self, detail=detail)


assert tuple(field.name for field in fields(QuotaChange)) == QUOTA_CHANGE_LOG_COLUMNS


def write_change(client: Client, change: QuotaChange) -> None:
    """Store the row; returns when ClickHouse has acknowledged it. Again is harmless.

    Raises:
        RetryLater, LedgerNotMigrated, WorkerMustExit: see `ledger.client.ledger_errors`.
    """
    columns = ", ".join(f"`{name}`" for name in QUOTA_CHANGE_LOG_COLUMNS)
    with ledger_errors():
        client.execute(f"INSERT INTO {QUOTA_CHANGE_LOG} ({columns}) VALUES", [astuple(change)])
