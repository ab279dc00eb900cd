"""Ask the ledger from a command that also asks others: only its own errors are explained as its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, Self, TypeVar

from meterline.ledger.client import Client, connect, explained
from meterline.settings import ClickHouseSettings

__all__ = ["LedgerAsker"]

P = ParamSpec("P")
T = TypeVar("T")


class Recorded(Protocol):
    """A row that says what was ordered, and later what came of it."""

    def done(self, detail: str) -> Self:
        """The same row, with what came of it."""


Order = TypeVar("Order", bound=Recorded)


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

    @contextmanager
    def recorded(self, write: Callable[[Client, Order], None], order: Order) -> Iterator[list[str]]:
        """Write an order's row, let it be carried out, and write what came of it: the first line noted."""
        self.ask(write, order)
        outcome: list[str] = []
        yield outcome
        self.ask(write, order.done(outcome[0]))
