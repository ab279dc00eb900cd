"""`meterline billing held|release|resolve|pause|resume|shadow`: what is held, and what a person orders.

An order is a row of the ledger, with who and why; the worker that owns the client carries it out and writes
what it did. So an order needs no running worker, and none is carried out twice.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from meterline.cli.period import iso
from meterline.cli.who import By, check_reason, person
from meterline.errors import UserError
from meterline.ledger.asker import LedgerAsker
from meterline.ledger.billing_orders import BillingOrder, write_order
from meterline.ledger.billing_reports import Held, held_items
from meterline.settings import load_settings

__all__ = ["REMEDIES", "held", "pause", "release", "resolve", "resume", "shadow"]

REMEDIES = {
    "no_customer": "set one: meterline clients set CLIENT --stripe-customer cus_...",
    "unmapped_sku": "add the SKU to the meters file and raise its version",
    "unverified": "the ledger and the window differ: see docs/operations.md, held windows",
    "refused": "correct what Stripe's text says, then: meterline billing release TARGET",
    "unknown_outcome": "nothing: it is compared with Stripe's summary, or carried when its period closes",
    "invoice_final": "nothing: it is carried into the current period when its own is closed",
    "too_old": "nothing: Stripe takes no usage older than 35 days; it is carried",
    "foreign_usage": "somebody else feeds the meter: see docs/operations.md; then release, or resolve",
    "no_subscription": "subscribe the customer to a price on the meter, or no invoice will show its usage",
    "other_period": "the subscription has another period: meterline clients set CLIENT --period-anchor ...",
    "price_unusable": "one price without transform_quantity per customer and meter; then resolve",
    "no_invoice": "find out what was charged, then: meterline billing resolve TARGET --invoice-units N",
    "invoice_void": "find out what was charged instead, then resolve",
    "no_client": "put the client back into the registry: meterline clients set CLIENT ...",
}

Target = Annotated[str, typer.Argument(metavar="TARGET", help="As `meterline billing held` lists it.")]
WhichClient = Annotated[str, typer.Option("--client", help="One client; default: all of them.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept in the ledger.")]


def held(
    client: WhichClient = "",
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """List what doesn't move by itself, why, and what to do about it."""
    with LedgerAsker(load_settings().clickhouse) as ledger:
        items = ledger.ask(held_items, client)
    if as_json:
        rows = [_as_row(item) for item in items]
        typer.echo(json.dumps(rows))
        return
    if not items:
        typer.echo("Nothing is held.")
        return
    table = Table("client", "reason", "units", "credits", "window", "since", "target")
    for item in items:
        table.add_row(
            item.client_id,
            item.reason,
            str(item.units),
            f"{item.credits:f}",
            iso(item.window_start),
            iso(item.since),
            item.target,
        )
    Console(soft_wrap=True).print(table)
    for reason in sorted({item.reason for item in items} & REMEDIES.keys()):
        typer.echo(f"{reason}: {REMEDIES[reason]}")


def release(target: Target, reason: Reason, by: By = "") -> None:
    """Let a refused record be tried again, or an account whose meter somebody else fed be compared again."""
    item = _held_item(target)
    if item.reason not in {"refused", "foreign_usage"}:
        raise UserError(f"{target} is held as {item.reason}: {REMEDIES.get(item.reason, 'see docs')}")
    _order("release", reason, by, client_id=item.client_id, target=target)
    typer.echo(
        f"Ordered. A billing worker carries it out; see `meterline billing held --client {item.client_id}`."
    )


def resolve(
    target: Target,
    invoice_units: Annotated[int, typer.Option(min=0, help="The units its invoice really charges.")],
    reason: Reason,
    by: By = "",
) -> None:
    """Close an account by hand, where its invoice can't be read: what it doesn't charge is carried on."""
    item = _held_item(target)
    _order("resolve", reason, by, client_id=item.client_id, target=target, value=invoice_units)
    typer.echo("Ordered. A billing worker closes it; the view billing_periods then shows what was carried.")


def pause(reason: Reason, client: WhichClient = "", by: By = "") -> None:
    """Send nothing from now on. Usage is counted and waits; past its invoice it is carried."""
    _switch("pause", client, reason, by)


def resume(reason: Reason, client: WhichClient = "", by: By = "") -> None:
    """Send again, after pause or shadow."""
    _switch("resume", client, reason, by)


def shadow(reason: Reason, client: WhichClient = "", by: By = "") -> None:
    """Do everything but send: to compare with another way of billing. What was in shadow is never sent."""
    _switch("shadow", client, reason, by)


def _switch(action: str, client: str, reason: str, by: str) -> None:
    _order(action, reason, by, client_id=client)
    typer.echo(f"{action}: {client or 'all clients'}. Running workers notice within a few seconds.")


def _held_item(target: str) -> Held:
    with LedgerAsker(load_settings().clickhouse) as ledger:
        items = ledger.ask(held_items)
    for item in items:
        if item.target == target:
            return item
    raise UserError(f"Nothing of that name is held: {target}. List them: meterline billing held")


def _order(action: str, reason: str, by: str, *, client_id: str, target: str = "", value: int = 0) -> None:
    check_reason(reason, "wrong price since Tuesday")
    order = BillingOrder(
        order_id=uuid.uuid4().hex,
        ordered_at=time.time_ns() // 1_000_000,
        action=action,
        client_id=client_id,
        target=target,
        value=value,
        ordered_by=person(by),
        reason=reason,
    )
    with LedgerAsker(load_settings().clickhouse) as ledger:
        ledger.ask(write_order, order)


def _as_row(item: Held) -> dict[str, object]:
    moments = {"window_start": iso(item.window_start), "since": iso(item.since)}
    return asdict(item) | moments | {"credits": str(item.credits), "remedy": REMEDIES.get(item.reason, "")}
