"""`meterline clients set|list`: the client registry."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from meterline.cli.who import By, person
from meterline.clients import ClientRegistry
from meterline.domain.clients import DEFAULT_ANCHORS_MS, Client, PeriodUnit, QuotaPolicy
from meterline.errors import UserError
from meterline.settings import load_settings

__all__ = ["app"]

READ_TIMEOUT_S = 30.0
"""A compacted topic of a million clients is read in seconds; a broker that hangs is told as such."""

app = typer.Typer(no_args_is_help=True, help="The client registry: set and list.", rich_markup_mode=None)


@app.command("set")
def set_client(  # noqa: PLR0917 - typer passes every one by its name
    client_id: Annotated[str, typer.Argument(metavar="CLIENT")],
    stripe_customer: Annotated[
        str | None, typer.Option("--stripe-customer", help="Stripe's id of the customer, cus_...")
    ] = None,
    no_stripe_customer: Annotated[
        bool, typer.Option("--no-stripe-customer", help="Hold the usage from now on.")
    ] = False,
    period: Annotated[PeriodUnit | None, typer.Option(help="Length of a billing period.")] = None,
    anchor: Annotated[
        str | None, typer.Option(help="A moment a period starts, ISO 8601; without a time zone it is UTC.")
    ] = None,
    policy: Annotated[QuotaPolicy | None, typer.Option(help="When credits cannot be asked for.")] = None,
    alert_levels: Annotated[
        str | None,
        typer.Option(
            "--alert-levels", help="Percent of the granted credits used, e.g. 50,80; empty: only exhaustion."
        ),
    ] = None,
    test: Annotated[
        bool | None, typer.Option("--test/--no-test", help="Nothing is sent to Stripe in live mode.")
    ] = None,
    paused: Annotated[
        bool | None, typer.Option("--pause/--no-pause", help="Make usage records, send none.")
    ] = None,
    by: By = "",
) -> None:
    """Add a client, or change what is given; everything else stays as it is."""
    if stripe_customer is not None and no_stripe_customer:
        raise UserError("give --stripe-customer or --no-stripe-customer, not both")
    changes: dict[str, Any] = {
        name: value
        for name, value in {
            "stripe_customer_id": stripe_customer,
            "period_unit": period,
            "period_anchor": None if anchor is None else _anchor_ms(anchor),
            "quota_policy": policy,
            "alert_levels_percent": None if alert_levels is None else _levels(alert_levels),
            "test": test,
            "sending_paused": paused,
        }.items()
        if value is not None
    }
    if no_stripe_customer:
        changes["stripe_customer_id"] = None
    with ClientRegistry(load_settings()) as registry:
        registry.wait_until_caught_up(READ_TIMEOUT_S)
        known = registry.get(client_id)
        former = known or Client(client_id)
        if period not in {None, former.period_unit} and anchor is None:
            changes["period_anchor"] = DEFAULT_ANCHORS_MS[PeriodUnit(period)]
        client = replace(former, **changes, updated_at=time.time_ns() // 1_000_000, updated_by=person(by))
        registry.put(client)
    typer.echo(f"{'Added' if known is None else 'Changed'} {_described(client)}")


@app.command("list")
def list_clients(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """All clients of the registry."""
    with ClientRegistry(load_settings()) as registry:
        registry.wait_until_caught_up(READ_TIMEOUT_S)
        clients = sorted(registry.snapshot().values(), key=lambda client: client.client_id)
    if as_json:
        typer.echo(json.dumps([asdict(client) for client in clients]))
        return
    if not clients:
        typer.echo("The registry knows no client. Add one: meterline clients set CLIENT")
        return
    table = Table("client", "Stripe customer", "period", "policy", "sending", "changed", "by")
    for client in clients:
        table.add_row(
            client.client_id,
            client.stripe_customer_id or "none: held",
            _period(client),
            client.quota_policy.value,
            _sending(client),
            _utc(client.updated_at),
            client.updated_by,
        )
    Console(markup=False).print(table)


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(level) for level in text.split(",") if level.strip()}))
    except ValueError:
        raise UserError(f"--alert-levels {text!r} must be percentages, for example 50,80") from None


def _anchor_ms(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"--anchor {text!r} is not ISO 8601; write for example 2026-11-01") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp()) * 1000  # Stripe's billing cycle anchors are whole seconds


def _described(client: Client) -> str:
    return (
        f"{client.client_id}: Stripe customer {client.stripe_customer_id or 'none (usage is held)'}, "
        f"period {_period(client)}, policy {client.quota_policy.value}, sending {_sending(client)}."
    )


def _period(client: Client) -> str:
    return f"{client.period_unit.value} from {_utc(client.period_anchor)}"


def _sending(client: Client) -> str:
    return ("paused" if client.sending_paused else "on") + (" (test client)" if client.test else "")


def _utc(t_ms: int) -> str:
    return datetime.fromtimestamp(t_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
