"""Before money moves: does the ledger, line by line, add up to what the snapshot says?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meterline.billing.notices import Told
from meterline.domain.account_books import About
from meterline.domain.accounts import DAY_S, AccountKey
from meterline.domain.windows import WindowSnapshot
from meterline.ledger.billing_orders import BillingOrder, newest_switches, orders_since
from meterline.ledger.client import Client, ledger_errors
from meterline.ledger.queries import window_sums
from meterline.ledger.reader import LedgerReader

__all__ = ["LedgerVerifier"]


@dataclass(frozen=True, slots=True)
class LedgerVerifier:
    """What billing asks the ledger, on behalf of all partitions of a worker."""

    reader: LedgerReader

    async def verified(self, snapshots: Sequence[WindowSnapshot]) -> list[bool]:
        """For each snapshot whether the ledger's rows up to its cutoff add up to it, SKU by SKU."""
        if not snapshots:
            return []
        windows = [(snapshot.ref, snapshot.cutoff_offset) for snapshot in snapshots]
        sums = await self.reader.ask(window_sums, windows)
        return [snapshot.skus == total for snapshot, total in zip(snapshots, sums, strict=True)]

    async def told(self, log_id: str, partition: int, identifiers: Sequence[str]) -> Mapping[str, Told]:
        """Those of the identifiers that this partition of usage.windows wrote down."""
        return await self.reader.ask(_told, log_id, partition, identifiers)

    async def switches(self) -> Mapping[str, str]:
        """The newest order about sending, by client; '' for all."""
        return await self.reader.ask(newest_switches)

    async def orders_since(self, ordered_at: int) -> Sequence[BillingOrder]:
        """Orders about records and accounts, oldest first."""
        return await self.reader.ask(orders_since, ordered_at)

    async def next_seq(self, log_id: str, partition: int) -> int:
        """One more than the newest step of billing the ledger has of a partition of usage.windows."""
        return await self.reader.ask(_next_seq, log_id, partition)


def _next_seq(client: Client, log_id: str, partition: int) -> int:
    with ledger_errors():
        ((count, last),) = client.execute(
            "SELECT count(), max(seq) FROM usage_record_log"
            " WHERE log_id = %(log_id)s AND `partition` = %(partition)s",
            {"log_id": log_id, "partition": partition},
        )
    return int(last) + 1 if count else 0


def _told(client: Client, log_id: str, partition: int, identifiers: Sequence[str]) -> dict[str, Told]:
    with ledger_errors():
        rows = client.execute(
            "SELECT identifier, client_id, meter, toUnixTimestamp64Milli(period_start),"
            " toUnixTimestamp64Milli(period_end), stripe_customer, toUnixTimestamp(event_timestamp),"
            " window_id, toUnixTimestamp64Milli(window_start), toUnixTimestamp64Milli(window_end),"
            " source_topic_id, source_partition, cutoff_offset"
            " FROM usage_record_log WHERE log_id = %(log_id)s AND `partition` = %(partition)s"
            " AND kind = 'record' AND identifier IN %(identifiers)s LIMIT 1 BY identifier",
            {"log_id": log_id, "partition": partition, "identifiers": list(identifiers)},
        )
    return {
        identifier: Told(AccountKey(client_id, meter, start, end, customer), stamp // DAY_S, About(*about))
        for identifier, client_id, meter, start, end, customer, stamp, *about in rows
    }
