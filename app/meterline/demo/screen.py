"""What a person sees of the demo: progress while it runs, tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from meterline.demo.checker import MICRO, Accounts, ClientAccount
from meterline.demo.tasks import Worked

__all__ = ["Screen"]

WIDTH_OF_FILES = 140


class Screen:
    """Writes to a console; bars only where it is a terminal."""

    Show = Callable[[Accounts], None]

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        if not self._console.is_terminal:  # a file has no width to fold a table at
            self._console.width = WIDTH_OF_FILES

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, events: int) -> Iterator[Show]:
        """Bars for what the checker sees."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[seen]}"))
        with Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True) as bars:
            ledger = bars.add_task("events in the ledger", total=events, seen="0")
            billed = bars.add_task("credits at Stripe or held", total=None, seen="0")

            def show(accounts: Accounts) -> None:
                seen = sum(account.events for account in accounts.clients.values())
                bars.update(ledger, completed=seen, seen=f"{seen} of {events}")
                told = sum(
                    account.stripe_units * MICRO + account.held_micro for account in accounts.clients.values()
                )
                total = sum(account.file_micro for account in accounts.clients.values())
                bars.update(billed, completed=told, total=total, seen=f"{told // MICRO} of {total // MICRO}")

            yield show

    def clients(self, accounts: Accounts) -> None:
        """The table of clients."""
        table = Table(title="Every credit, from the file to Stripe", title_justify="left")
        table.add_column("client")
        for name in ("events", "in file", "ledger", "windows", "Stripe units", "remainder", "held"):
            table.add_column(name, justify="right")
        for client, account in accounts.clients.items():
            table.add_row(
                client,
                str(account.events),
                _credits(account.file_micro),
                _credits(account.ledger_micro),
                f"{_credits(account.windows_micro)} in {account.windows}",
                str(account.stripe_units),
                _credits(account.remainder_micro),
                f"{_credits(account.held_micro)} ({', '.join(sorted(account.held_reasons))})"
                if account.held_reasons
                else "0",
            )
        self._console.print(table)

    def credit_buckets(self, accounts: Accounts) -> None:
        """The table of credits: the log has charged each bucket what stands in the ledger."""
        table = Table(title="Credits, granted and left", title_justify="left")
        table.add_column("client")
        for name in ("granted", "charged by the log", "available", "alerts"):
            table.add_column(name, justify="right")
        for client, account in accounts.clients.items():
            table.add_row(
                client,
                _credits(account.granted_micro),
                _credits(account.consumed_micro),
                _credits(account.available_micro),
                str(account.alerts),
            )
        self._console.print(table)

    def trial(self, client: str, worked: Worked, account: ClientAccount) -> None:
        """How a client ran out of credits."""
        self.say(
            f"{client} had {_credits(account.granted_micro)} credits: {worked.done} tasks done, "
            f"{worked.failed} failed and cost nothing, {worked.refused} refused before they began; "
            f"{_credits(account.available_micro)} left, alerted {account.alerts} time(s)"
        )

    def dead_letters(self, accounts: Accounts) -> None:
        """The table of dead letters."""
        table = Table(
            "reason", "dead letters", title="Refused, and kept with their reason", title_justify="left"
        )
        for reason, count in sorted(accounts.dead.items()):
            table.add_row(reason, str(count))
        self._console.print(table)

    def problems(self, problems: Sequence[str]) -> None:
        """What is not accounted for."""
        for problem in problems:
            self._console.print(f"NOT CONSERVED: {problem}", style="red", markup=False, soft_wrap=True)


def _credits(micro: int) -> str:
    return f"{Decimal(micro) / MICRO:,f}"
