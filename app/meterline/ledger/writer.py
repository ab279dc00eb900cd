"""Inserts with group commit: rows that wait while one INSERT runs go together in the next one.

Inserting is idempotent by row identity, so every failure that can heal is answered by sending the same rows
again, for ever. Back-pressure is the caller's: it waits until its rows are acknowledged.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from meterline.errors import MeterlineError, RetryLater, WorkerMustExit
from meterline.ledger.blocks import EncodedBlock, Insert
from meterline.ledger.client import ROWS_PER_BLOCK_MAX, Client, connect, translate
from meterline.logs import get_logger
from meterline.settings import ClickHouseSettings

__all__ = ["ROWS_PER_INSERT_MAX", "LedgerWriter"]

ROWS_PER_INSERT_MAX = ROWS_PER_BLOCK_MAX
"""Rows that go together in one INSERT: one block, so one part for each day. At the slowest server measured
(37,000 rows/s) it takes 3 s, a tenth of the time after which an attempt counts as failed. An insert that is
larger by itself goes alone, in several blocks."""

BACKOFF_S_MIN = 0.1
"""A restarted ClickHouse is back within half a second: the first waits are short."""
BACKOFF_S_MAX = 5.0
"""After an outage the ledger is caught up within seconds; one attempt in 5 s does not hold a server down."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiter:
    """The rows of one caller, and the future it waits on."""

    data: Sequence[Sequence[Any]]
    block: EncodedBlock | None
    acknowledged: asyncio.Future[None]

    @property
    def rows(self) -> int:
        return (len(self.data[0]) if self.data else 0) + (self.block.rows if self.block is not None else 0)


@dataclass(slots=True)
class _Lane:
    """What waits for one table and list of columns."""

    table: str
    columns: tuple[str, ...]
    waiting: deque[_Waiter] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None


class LedgerWriter:
    """Writes rows to the ledger from one event loop, over one connection, in one thread of its own.

    The loop never blocks on ClickHouse (a worker must go on with its heartbeats in an outage).
    """

    def __init__(self, settings: ClickHouseSettings) -> None:
        self._settings = settings
        self._lanes: dict[tuple[str, tuple[str, ...]], _Lane] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._client: Client | None = None
        self._closed = False

    async def insert(
        self,
        table: str,
        columns: Sequence[str],
        data: Sequence[Sequence[Any]],
        block: EncodedBlock | None = None,
    ) -> None:
        """Store rows; returns when ClickHouse has acknowledged them.

        Args:
            table: see `meterline.ledger.tables`.
            columns: the names of the columns in `data`.
            data: one sequence per column, all of one length. They are read until the call returns and never
                changed. Times are ints in the column's unit. Empty: no rows but those of the block.
            block: more rows, encoded, in the same columns.

        Raises:
            WorkerMustExit: ClickHouse refuses these rows for good, or the writer is closed.
        """
        if self._closed:
            raise WorkerMustExit("the ledger's writer is closed")
        if data and (len(data) != len(columns) or len({len(column) for column in data}) != 1):
            raise WorkerMustExit(f"{table}: {len(columns)} columns of one length expected")
        key = (table, tuple(columns))
        lane = self._lanes.setdefault(key, _Lane(*key))
        waiter = _Waiter(data, block, asyncio.get_running_loop().create_future())
        if not waiter.rows:
            return
        lane.waiting.append(waiter)
        if lane.task is None or lane.task.done():
            lane.task = asyncio.create_task(self._drain(lane))
        await waiter.acknowledged

    async def close(self) -> None:
        """Stop at once; who still waits gets `WorkerMustExit`. Ends within the connection's time-outs."""
        self._closed = True
        for lane in self._lanes.values():
            if lane.task is not None:
                lane.task.cancel()
            _fail(lane.waiting, WorkerMustExit("the ledger's writer was closed before ClickHouse answered"))
        client = self._client
        if client is not None and (connected := client.connection.socket) is not None:
            # Wakes the thread if it waits for an answer. It then puts the connection away itself: two who do
            # that at the same time trip over each other.
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        if self._client is not None:
            self._client.disconnect()

    async def _drain(self, lane: _Lane) -> None:
        """Send what waits, group by group, until nothing does."""
        while lane.waiting:
            group = _next_group(lane.waiting)
            try:
                await self._store(lane, group)
            except MeterlineError as error:
                _fail(group, error)
            except asyncio.CancelledError:
                _fail(group, WorkerMustExit("the ledger's writer was closed before ClickHouse answered"))
                raise

    async def _store(self, lane: _Lane, group: Sequence[_Waiter]) -> None:
        """Attempt one group until it is acknowledged; who was cancelled meanwhile is left out."""
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_S_MIN
        while group := [waiter for waiter in group if not waiter.acknowledged.done()]:
            try:
                await loop.run_in_executor(self._thread, self._attempt, lane.table, lane.columns, group)
            except RetryLater as error:
                # Full jitter above the half: workers that lost one server do not return in step.
                delay_s = backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
                log.warning(
                    "ledger insert failed, trying again",
                    table=lane.table,
                    rows=sum(waiter.rows for waiter in group),
                    retry_in_s=round(delay_s, 2),
                    error=str(error),
                )
                await asyncio.sleep(delay_s)
                backoff_s = min(backoff_s * 2, BACKOFF_S_MAX)
            else:
                for waiter in group:
                    if not waiter.acknowledged.done():
                        waiter.acknowledged.set_result(None)
                return

    def _attempt(self, table: str, columns: Sequence[str], group: Sequence[_Waiter]) -> None:
        """One INSERT, in the thread. After any error the next attempt begins with a fresh connection.

        The lists are made anew for each attempt: the driver may change those it is given.
        """
        parts = zip(*(waiter.data for waiter in group if waiter.data), strict=True)
        data = [list(chain.from_iterable(column)) for column in parts]
        blocks = [waiter.block for waiter in group if waiter.block is not None]
        names = ", ".join(f"`{column}`" for column in columns)
        if self._client is None:
            self._client = connect(self._settings)
        try:
            self._client.execute(f"INSERT INTO {table} ({names}) VALUES", Insert(data, blocks), columnar=True)
        except Exception as error:  # whatever it was, this connection is not used again
            self._client.disconnect()
            self._client = None
            raise translate(error) from error


def _next_group(waiting: deque[_Waiter]) -> list[_Waiter]:
    """Take from the front as many as one INSERT may hold, at least one."""
    group = [waiting.popleft()]
    rows = group[0].rows
    while waiting and rows + waiting[0].rows <= ROWS_PER_INSERT_MAX:
        group.append(waiting.popleft())
        rows += group[-1].rows
    return group


def _fail(waiters: Sequence[_Waiter] | deque[_Waiter], error: MeterlineError) -> None:
    for waiter in waiters:
        if not waiter.acknowledged.done():
            waiter.acknowledged.set_exception(error)
