"""Before money moves: does the ledger, line by line, add up to what the snapshot says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meterline.domain.windows import WindowSnapshot
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
