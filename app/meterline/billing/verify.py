"""Before money moves: does the ledger, line by line, add up to what the snapshot says?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import stamina

from meterline.domain.windows import WindowSnapshot
from meterline.errors import RetryLater
from meterline.ledger.client import Client, connect, ledger_errors
from meterline.ledger.queries import window_sums
from meterline.settings import ClickHouseSettings

__all__ = ["LedgerReader"]

T = TypeVar("T")

RETRY_S_MIN = 0.1
RETRY_S_MAX = 5.0
"""As the ledger's writer: without the ledger nothing can be billed, so there is nothing to do but wait."""


class LedgerReader:
    """Asks the ledger on behalf of all partitions of a worker: one connection, one thread."""

    def __init__(self, settings: ClickHouseSettings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-reader")
        self._client: Client | None = None

    async def verified(self, snapshots: Sequence[WindowSnapshot]) -> list[bool]:
        """For each snapshot whether the ledger's rows up to its cutoff add up to it, SKU by SKU."""
        if not snapshots:
            return []
        windows = [(snapshot.ref, snapshot.cutoff_offset) for snapshot in snapshots]
        sums = await self._ask(lambda client: window_sums(client, windows))
        return [snapshot.skus == sum_ for snapshot, sum_ in zip(snapshots, sums, strict=True)]

    async def next_seq(self, log_id: str, partition: int) -> int:
        """One more than the newest step of billing the ledger has of a partition of usage.windows."""

        def ask(client: Client) -> int:
            with ledger_errors():
                ((count, last),) = client.execute(
                    "SELECT count(), max(seq) FROM usage_record_log"
                    " WHERE log_id = %(log_id)s AND `partition` = %(partition)s",
                    {"log_id": log_id, "partition": partition},
                )
            return int(last) + 1 if count else 0

        return await self._ask(ask)

    async def close(self) -> None:
        """Let go of the connection; a question that is under way ends within its time-out."""
        if self._client is not None:
            self._client.disconnect()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def _ask(self, question: Callable[[Client], T]) -> T:
        """Until the ledger answers."""
        loop = asyncio.get_running_loop()
        async for attempt in stamina.retry_context(
            on=RetryLater, attempts=None, timeout=None, wait_initial=RETRY_S_MIN, wait_max=RETRY_S_MAX
        ):
            with attempt:
                return await loop.run_in_executor(self._thread, self._ask_once, question)
        raise AssertionError("retries without a limit don't end")

    def _ask_once(self, question: Callable[[Client], T]) -> T:
        if self._client is None:
            self._client = connect(self._settings)
        try:
            return question(self._client)
        except Exception:
            self._client.disconnect()  # whatever it was: the next question begins with a fresh connection
            self._client = None
            raise
