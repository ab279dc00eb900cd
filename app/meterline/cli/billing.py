"""`meterline billing`: what billing knows, holds and has sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from meterline.cli.period import iso
from meterline.domain.credits import format_credits
from meterline.ledger.client import connect, explained
from meterline.ledger.reports import BillingState, billing_states
from meterline.settings import load_settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What billing knows, holds and has sent.", rich_markup_mode=None)

REMEDIES = {
    "no_customer": "set one: meterline clients set CLIENT --stripe-customer cus_...",
    "unmapped_sku": "add the SKU to the meters file and raise its version",
    "unverified": "the ledger and the window differ: see docs/operations.md, held windows",
    "refused": "Stripe's text is in the view usage_records; see docs/operations.md",
    "unknown_outcome": "compare with Stripe's event summaries; see docs/operations.md",
    "invoice_final": "its invoice is closed; see docs/operations.md",
    "too_old": "Stripe takes no usage older than 35 days; see docs/operations.md",
}


@app.callback()
def billing() -> None:
    """What billing knows, holds and has sent."""


@app.command()
def status(
    clients: Annotated[bool, typer.Option("--clients", help="A line for each client.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """How many windows and usage records stand where, and what to do about those that are held."""
    settings = load_settings().clickhouse
    with explained(settings), connect(settings) as client:
        states = billing_states(client, by_client=clients)
    if as_json:
        rows = [asdict(state) | {"oldest_window": iso(state.oldest_window)} for state in states]
        typer.echo(json.dumps(rows))
        return
    if not states:
        typer.echo("Billing has taken in no window yet. Is a worker running? meterline worker billing")
        return
    Console().print(_table(states, clients=clients))
    for reason in sorted({state.reason for state in states} & REMEDIES.keys()):
        typer.echo(f"{reason}: {REMEDIES[reason]}")


def _table(states: Sequence[BillingState], *, clients: bool) -> Table:
    table = Table(*(["client"] if clients else []), "state", "reason")
    for name in ("count", "credits", "units"):
        table.add_column(name, justify="right")
    table.add_column("oldest window")
    for state in states:
        table.add_row(
            *([state.client_id] if clients else []),
            state.state or "counted, no whole unit",
            state.reason,
            str(state.count),
            format_credits(state.credits_micro),
            str(state.value),
            iso(state.oldest_window),
        )
    return table
