"""Ask the ledger from asyncio code: patient, in a thread, never blocking the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from meterline.errors import RetryLater
from meterline.ledger.client import Client, connect, ledger_errors
from meterline.logs import get_logger
from meterline.settings import ClickHouseSettings

__all__ = ["LedgerReader"]

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
"""Questions at a time; each has a connection of its own."""

PAUSE_S = 0.5

log = get_logger(__name__)


class LedgerReader:
    """Runs the functions of `ledger.queries`, as often as it takes until ClickHouse answers."""

    def __init__(self, settings: ClickHouseSettings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="ledger-reader")

    async def ask(
        self, question: Callable[Concatenate[Client, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The answer of a query function, called with a client and the arguments.

        Raises:
            WorkerMustExit: the query can never succeed.
        """
        warned = False
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._ask_once, question, args, kwargs
                )
            except RetryLater as error:
                if not warned:
                    log.warning("waiting for the ledger", error=str(error))
                    warned = True
                await asyncio.sleep(PAUSE_S)

    async def wait_until_up(self) -> None:
        """Return when ClickHouse answers."""
        await self.ask(_ping)

    def _ask_once(self, question: Callable[..., T], args: Any, kwargs: Any) -> T:
        client = connect(self._settings)
        try:
            return question(client, *args, **kwargs)
        finally:
            client.disconnect()

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _ping(client: Client) -> None:
    with ledger_errors():
        client.execute("SELECT 1")
