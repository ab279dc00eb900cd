"""`meterline usage CLIENT`: what a client used, by hour and SKU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from meterline.cli.period import Since, Until, iso, parse_period
from meterline.domain.credits import format_credits
from meterline.ledger.client import connect, explained
from meterline.ledger.reports import HourUsage, has_usage, hours
from meterline.settings import load_settings

__all__ = ["usage"]


def usage(
    client_id: Annotated[str, typer.Argument(metavar="CLIENT", help="The client's id.")],
    since: Since = "",
    until: Until = "",
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """A client's usage by hour and SKU, with totals. Hours still open may grow."""
    period = parse_period(since, until)
    settings = load_settings().clickhouse
    with explained(settings), connect(settings) as client:
        used = hours(client, client_id, period)
        known = bool(used) or has_usage(client, client_id)
    if not known:
        typer.echo(f"Error: the ledger has no usage of a client `{client_id}`. Is the id right?", err=True)
        raise typer.Exit(1)
    if as_json:
        typer.echo(json.dumps(_as_json(client_id, used)))
    else:
        Console().print(_as_table(client_id, used))


def _as_table(client_id: str, used: Sequence[HourUsage]) -> Table:
    table = Table(title=f"Usage of {client_id}", show_footer=bool(used))
    totals = _totals(used)
    table.add_column("hour (UTC)", "total")
    table.add_column("SKU")
    table.add_column("events", str(totals["events"]), justify="right")
    table.add_column("credits", totals["credits"], justify="right")
    table.add_column("free events", str(totals["free_events"]), justify="right")
    table.add_column("free credits", totals["free_credits"], justify="right")
    table.add_column("state")
    for row in used:
        table.add_row(
            f"{row.hour:%Y-%m-%d %H:%M}",
            row.sku,
            str(row.events),
            format_credits(row.credits_micro),
            str(row.free_events),
            format_credits(row.free_credits_micro),
            "closed" if row.closed else "open",
        )
    return table


def _as_json(client_id: str, used: Sequence[HourUsage]) -> dict[str, Any]:
    """Credits are decimal strings for reading and integers of micro-credits for computing."""
    return {
        "client_id": client_id,
        "hours": [
            {"hour": iso(row.hour), "sku": row.sku, **_totals([row]), "closed": row.closed} for row in used
        ],
        "skus": {
            sku: _totals([row for row in used if row.sku == sku]) for sku in sorted({row.sku for row in used})
        },
        "totals": _totals(used),
    }


def _totals(used: Sequence[HourUsage]) -> dict[str, Any]:
    charged = sum(row.credits_micro for row in used)
    free = sum(row.free_credits_micro for row in used)
    return {
        "events": sum(row.events for row in used),
        "credits": format_credits(charged),
        "credits_micro": charged,
        "free_events": sum(row.free_events for row in used),
        "free_credits": format_credits(free),
        "free_credits_micro": free,
    }
