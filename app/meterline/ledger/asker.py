"""Ask the ledger from a command that also asks others: only its own errors are explained as its own."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

from meterline.ledger.client import Client, connect, explained
from meterline.settings import ClickHouseSettings

__all__ = ["LedgerAsker"]

P = ParamSpec("P")
T = TypeVar("T")


class LedgerAsker:
    """One connection, for one thread.

    with LedgerAsker(settings.clickhouse) as ledger:
        ledger.ask(has_usage, "acme")
    """

    def __init__(self, settings: ClickHouseSettings) -> None:
        self._settings = settings
        self._client = connect(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()

    def ask(self, question: Callable[Concatenate[Client, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer of a function that takes a client first.

        Raises:
            UserError: ClickHouse is away or not migrated; the text says what to do.
        """
        with explained(self._settings):
            return question(self._client, *args, **kwargs)
