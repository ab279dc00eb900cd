"""What people ask the ledger about billing: what is held, and how each period came out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from meterline.ledger.client import Client, ledger_errors

__all__ = ["Held", "held_items"]


@dataclass(frozen=True, slots=True)
class Held:
    """A window, a usage record, or an account that doesn't move by itself.

    Attributes:
        target: identifier of the record, or id of the window or account: what orders name.
        units: of a usage record.
        credits: of a window.
    """

    target: str
    client_id: str
    meter: str
    reason: str
    units: int
    credits: Decimal
    window_start: datetime
    since: datetime
    detail: str


def held_items(client: Client, client_id: str = "") -> list[Held]:
    """All that is held, or all of one client, longest first."""
    with ledger_errors():
        rows = client.execute(
            """
            SELECT identifier, window_id, client_id, meter, reason, value, credits, window_start,
                   last_recorded_at, detail
            FROM usage_records
            WHERE state IN ('held', 'refused')
            ORDER BY last_recorded_at, client_id, identifier, window_id
            """
        )
    return [
        Held(identifier or window_id, *rest)
        for identifier, window_id, *rest in rows
        if client_id in {"", rest[0]}
    ]
