"""Grants from the log into the buckets and into the ledger, each at its own pace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from meterline.contracts.topics import CREDIT_GRANTS
from meterline.errors import PartitionHalted
from meterline.ledger.tables import CREDIT_GRANT_LOG, CREDIT_GRANT_LOG_COLUMNS
from meterline.ledger.writer import LedgerWriter
from meterline.logs import get_logger
from meterline.quota.grants import GrantBook, GrantLog
from meterline.quota.owner import CommitState
from meterline.quota.rows import GrantRow, grant_columns
from meterline.quota.shards import Shards

__all__ = ["GrantKeeper"]

CLIENTS_PER_CALL = 500
"""Buckets in one round trip: a few milliseconds of the server's time."""
ROWS_PER_INSERT = 5_000
LEDGER_ROWS_MAX = 100_000
"""Grants read and not yet in the ledger; at this limit no further ones are read, until ClickHouse is back."""
LEDGER_PAUSE_S = 0.5

log = get_logger(__name__)


class GrantKeeper:
    """Follows credit.grants. The buckets are told nothing before its end was seen once.

    A bucket of a rebuilt generation never heard of grants that its period's baseline made void: told one of
    them again, out of its order, it would count it.
    """

    def __init__(
        self,
        *,
        grants: GrantLog,
        book: GrantBook,
        store: Shards,
        writer: LedgerWriter,
        topic_id: str,
        saved: bytes | None,
    ) -> None:
        """Go on with the ledger where the changelog says.

        Args:
            topic_id: Kafka's id of credit.grants.
            saved: the record `ledger_state` gave.

        Raises:
            PartitionHalted: the topic was recreated.
        """
        self._grants = grants
        self._book = book
        self._store = store
        self._writer = writer
        self._topic_id = topic_id
        self._rows: list[GrantRow] = []
        self._in_ledger: dict[int, int] = {}
        self.is_complete = False
        """The end was seen: the book is whole, and grows with the log from now on."""
        if saved is not None:
            record = json.loads(saved)
            if record["topic_id"] != topic_id:
                raise PartitionHalted(
                    f"{CREDIT_GRANTS} was recreated: its topic id is {topic_id}, quota knows "
                    f"{record['topic_id']}. Every client's credits would be gone. Restore the topic"
                )
            self._in_ledger = {int(partition): offset for partition, offset in record["offsets"].items()}

    async def read(self) -> bool:
        """Take in what the log has; returns soon. True: something came that the buckets don't know."""
        if len(self._rows) >= LEDGER_ROWS_MAX:
            return False
        records = await self._grants.read()
        rows = self._book.take_all(records)
        self._rows += [row for row in rows if row.offset > self._in_ledger.get(row.partition, -1)]
        if not self.is_complete and not records and await self._grants.is_at_end():
            self.is_complete = True
        return self.is_complete and not self._book.is_all_told

    async def tell(self) -> None:
        """Bring the buckets up to what was read."""
        if not self.is_complete:
            return
        while calls := self._book.untold(CLIENTS_PER_CALL):
            for (client_id, ops), answers in zip(calls, await self._store.run(calls), strict=True):
                for op, answer in zip(ops, answers, strict=True):
                    if answer.startswith("e"):
                        log.error("grant refused by the bucket", client=client_id, grant=op, why=answer[2:])
            self._book.told(calls)

    def forget_told(self) -> None:
        """The buckets are empty."""
        self._book.forget_told()

    async def has_told_all(self) -> bool:
        """Whether every grant that is in the log now was read and told to its bucket."""
        return self.is_complete and self._book.is_all_told and await self._grants.is_at_end()

    async def fill_ledger(self, key: bytes, commit: CommitState) -> None:
        """Bring the rows into the ledger; until cancelled. ClickHouse away holds up nobody's credits."""
        while True:
            rows = self._rows[:ROWS_PER_INSERT]
            if not rows:
                await asyncio.sleep(LEDGER_PAUSE_S)
                continue
            columns = grant_columns(self._topic_id, rows)
            await self._writer.insert(CREDIT_GRANT_LOG, CREDIT_GRANT_LOG_COLUMNS, columns)
            for row in rows:
                self._in_ledger[row.partition] = max(row.offset, self._in_ledger.get(row.partition, -1))
            saved: Mapping[str, object] = {"topic_id": self._topic_id, "offsets": self._in_ledger}
            await commit([(key, json.dumps(saved).encode())], ())
            del self._rows[: len(rows)]
