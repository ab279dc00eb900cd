"""`meterline billing`: what billing knows, holds and has sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from meterline.billing.clock import StripeClock
from meterline.billing.meters import load_meters
from meterline.billing.send import stripe_client
from meterline.billing.stripe_meters import ensure_meters
from meterline.cli.billing_orders import REMEDIES, held, pause, release, resolve, resume, shadow
from meterline.cli.period import iso
from meterline.domain.credits import format_credits
from meterline.ledger.client import connect, explained
from meterline.ledger.reports import BillingState, billing_states
from meterline.settings import load_settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What billing knows, holds and has sent.", rich_markup_mode=None)
meters = typer.Typer(no_args_is_help=True, help="The meters of the meters file.", rich_markup_mode=None)
app.add_typer(meters, name="meters")
for command in (held, release, resolve, pause, resume, shadow):
    app.command()(command)


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


@meters.callback()
def meters_of_the_file() -> None:
    """The meters of the meters file."""


@meters.command()
def apply() -> None:
    """Create at Stripe what the meters file has and Stripe lacks; refuse what counts otherwise there."""
    settings = load_settings()
    wanted = load_meters(settings.billing.meters_file)
    created = ensure_meters(stripe_client(settings.stripe, StripeClock()), wanted.meters).created
    for meter in wanted.meters:
        state = "created" if meter.name in created else "there"
        unit = f"1 unit = {meter.unit_credits} credits"
        typer.echo(f"{meter.name}: {meter.event_name}, {unit}, {', '.join(meter.skus) or 'no SKUs'}: {state}")
    if wanted.free_skus:
        typer.echo(f"free: {', '.join(wanted.free_skus)}")


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
