"""What a person did to a halted partition, and why: one row, written before it is done.

A row whose `detail` says no more than that it was ordered tells that the command was interrupted.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import Self

from meterline.ledger.client import Client, ledger_errors
from meterline.ledger.quota_changes import ORDERED
from meterline.ledger.tables import REPAIR_LOG, REPAIR_LOG_COLUMNS

__all__ = ["Repair", "write_repair"]


@dataclass(frozen=True, slots=True)
class Repair:
    """One row of `repair_log`, in the order of its columns.

    Attributes:
        repair_id: with `ordered_at` its identity; chosen once.
        ordered_at: ms.
        action: state, ledger or log.
        topic_id: of usage.events, as it is now.
        changed_by: a person or a program.
        detail: what came of it.
    """

    repair_id: str
    ordered_at: int
    action: str
    topic_id: str
    partition: int
    first_offset: int
    last_offset: int
    changed_by: str
    reason: str
    detail: str = ORDERED

    def done(self, detail: str) -> Self:
        """The same repair, with what came of it: its row replaces the former one."""
        return replace(self, detail=detail)


assert tuple(field.name for field in fields(Repair)) == REPAIR_LOG_COLUMNS


def write_repair(client: Client, repair: Repair) -> None:
    """Store the row; returns when ClickHouse has acknowledged it. Again is harmless.

    Raises:
        RetryLater, LedgerNotMigrated, WorkerMustExit: see `ledger.client.ledger_errors`.
    """
    columns = ", ".join(f"`{name}`" for name in REPAIR_LOG_COLUMNS)
    with ledger_errors():
        client.execute(f"INSERT INTO {REPAIR_LOG} ({columns}) VALUES", [astuple(repair)])
