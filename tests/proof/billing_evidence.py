"""Reads what the checker of billing judges: rows of the ledger, the sandbox's journal, its invoices.

Nothing of the product is imported. Stripe has no list of meter events; the sandbox's journal has each one
that it counted, and each one that it accepted and rejected afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clickhouse_driver import Client as ClickHouse
from tests.proof.billing_books import Counted, Step
from tests.proof.quota_evidence import Places
from tests.sandbox_account import SandboxClient

__all__ = ["Journal", "absorbed_up_to", "final_invoices", "steps", "unclosed", "written_down"]

FINAL = ("open", "paid")
PAGE = 100


class Journal:
    """What Stripe counted; reads on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.counted: list[Counted] = []
        self.rejected: list[Counted] = []
        self._path, self._read = path, 0

    def read(self) -> None:
        """All that is there by now."""
        with self._path.open("rb") as lines:
            lines.seek(self._read)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                if b'"meter_event' in line:
                    self._take(json.loads(line)["changes"])

    @property
    def identifiers(self) -> set[str]:
        return {one.identifier for one in (*self.counted, *self.rejected)}

    def _take(self, changes: list[dict[str, Any]]) -> None:
        for change in changes:
            if change["kind"] not in {"meter_event", "meter_event_rejected"}:
                continue
            sent = change["object"]
            one = Counted(
                sent["identifier"],
                sent["payload"]["stripe_customer_id"],
                sent["timestamp"],
                sent["created"],
                int(sent["payload"]["value"]),
            )
            (self.counted if change["kind"] == "meter_event" else self.rejected).append(one)


def ledger(places: Places) -> ClickHouse:
    return ClickHouse(places.clickhouse_host, places.clickhouse_port, places.database)


def steps(places: Places) -> Iterator[Step]:
    """Each once: a crash between insert and commit leaves copies of rows until a merge."""
    with ledger(places) as asked:
        found = asked.execute_iter(
            "SELECT DISTINCT log_id, `partition`, seq, kind, client_id, "
            "toUnixTimestamp64Milli(period_start), toUnixTimestamp64Milli(window_start), "
            "source_partition, cutoff_offset, credits_micro, identifier, value, reason, "
            "toUnixTimestamp64Milli(recorded_at) FROM usage_record_log "
            "ORDER BY log_id, `partition`, seq",
            settings={"max_block_size": 50_000},
        )
        before = None
        for row in found:
            if before == row[:3]:
                raise AssertionError(f"two different steps under one number: {row}")
            before = row[:3]
            yield Step(*row[3:])


def absorbed_up_to(places: Places) -> tuple[int, int]:
    """See `Publisher.said_up_to`; of what is written down, and with it the usage records it made."""
    ((windows, cutoffs),) = _rows(
        places,
        "SELECT count(), sum(newest) FROM (SELECT max(cutoff_offset) AS newest FROM usage_record_log "
        "WHERE kind = 'advance' AND reason != 'carry' GROUP BY window_id)",
    )
    return windows, cutoffs


def written_down(places: Places) -> set[str]:
    """Identifiers of usage records that were not settled without an answer."""
    rows = _rows(
        places,
        "SELECT identifier FROM usage_record_log WHERE identifier != '' GROUP BY identifier "
        "HAVING countIf(kind = 'record') > 0 AND countIf(kind = 'settled') = 0",
    )
    return {name for (name,) in rows}


def unclosed(places: Places, before_ms: int) -> int:
    """Accounts whose period ended by then and that stand open."""
    ((accounts,),) = _rows(
        places,
        "SELECT count() FROM (SELECT client_id, period_start FROM usage_record_log WHERE kind != 'held' "
        f"AND meter != '' AND toUnixTimestamp64Milli(period_end) <= {before_ms} "
        "GROUP BY client_id, period_start HAVING countIf(kind = 'close') = 0)",
    )
    return accounts


def final_invoices(sandbox: SandboxClient) -> dict[tuple[str, int], int]:
    """The quantity of each final invoice, by customer and start of its period in milliseconds."""
    found: dict[tuple[str, int], int] = {}
    more: dict[str, str] = {}
    while True:
        page = sandbox.get("/v1/invoices", limit=PAGE, **more).body
        for invoice in page["data"]:
            if invoice["billing_reason"] != "subscription_cycle" or invoice["status"] not in FINAL:
                continue
            (line,) = invoice["lines"]["data"]
            place = invoice["customer"], line["period"]["start"] * 1000
            assert place not in found, f"two invoices of {place}"
            found[place] = line["quantity"]
        if not page["has_more"]:
            return found
        more = {"starting_after": page["data"][-1]["id"]}


def _rows(places: Places, query: str) -> list[tuple[Any, ...]]:
    with ledger(places) as asked:
        return asked.execute(query)
