"""`meterline quota`: give credits, read balances and reservations."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from meterline.cli.period import iso
from meterline.cli.quota_check import check
from meterline.cli.quota_orders import rebuild, void
from meterline.cli.who import By, check_reason, person
from meterline.clients import ClientRegistry
from meterline.domain.clients import Client, Period, period_of
from meterline.domain.credits import format_credits, to_micro
from meterline.domain.grants import CreditGrant, GrantKind
from meterline.errors import RetryLater, UserError
from meterline.ledger.asker import LedgerAsker
from meterline.quota.check import LostReservation, lost_work
from meterline.quota.giving import publish_grant
from meterline.quota.inspect import Bucket, BucketReader, Reservation, open_redis
from meterline.settings import RedisSettings, Settings, load_settings

__all__ = ["app"]

READ_S_MAX = 30.0
"""A compacted topic of a million clients is read in seconds; a broker that hangs is told as such."""
USABLE_S_MAX = 60.0
"""A worker that is up needs a second; one that is starting opens the buckets within some more."""
LOOK_S = 0.2

app = typer.Typer(
    no_args_is_help=True,
    help="Credit buckets: give credits, read them, check them.",
    rich_markup_mode=None,
)

ClientId = Annotated[str, typer.Argument(metavar="CLIENT", help="The client's id.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]


@app.command()
def grant(  # noqa: PLR0917 - typer passes every one by its name
    client_id: ClientId,
    amount: Annotated[
        str, typer.Argument(metavar="CREDITS", help="How many: 1000 or 0.25; six decimals at most.")
    ],
    reason: Annotated[str, typer.Option(help="Why, e.g. the number of the paid invoice.")],
    budget: Annotated[
        bool, typer.Option("--budget", help="For each billing period, instead of once until used.")
    ] = False,
    since: Annotated[
        str, typer.Option("--from", help="With --budget: a day in the first period it is for. Default: now.")
    ] = "",
    grant_id: Annotated[
        str,
        typer.Option("--grant-id", help="The grant's name: given again, it counts once. Default: a new one."),
    ] = "",
    by: By = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when the credits can be used (needs a quota worker).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Give a client credits: prepaid, or a budget for each billing period."""
    micro = _amount(amount, budget=budget)
    if since and not budget:
        raise UserError("--from belongs to --budget: prepaid credits count at once.")
    check_reason(reason, "invoice 2026-117")
    settings = load_settings()
    period = _period(settings, client_id, since) if budget else None
    given = CreditGrant(
        grant_id=grant_id or f"grant-{uuid.uuid4().hex}",
        client_id=client_id,
        kind=GrantKind.BUDGET if budget else GrantKind.PREPAID,
        credits_micro=micro,
        granted_at=_now_ms(),
        granted_by=person(by),
        reason=reason,
        period_start=None if period is None else period.start,
    )
    try:
        partition, offset = publish_grant(settings.kafka, given)
    except RetryLater as error:
        raise RetryLater(
            f"{error}\nIt may have been written all the same. Repeat the command with "
            f"--grant-id {given.grant_id}: then it counts once."
        ) from None
    if wait:
        _wait_until_usable(settings.redis, given)
    if as_json:
        record = {
            "grant_id": given.grant_id,
            "client_id": client_id,
            "kind": given.kind.value,
            "credits": format_credits(micro),
            "period_start": None if period is None else _utc(period.start),
            "granted_by": given.granted_by,
            "reason": reason,
            "partition": partition,
            "offset": offset,
        }
        typer.echo(json.dumps(record))
        return
    typer.echo(f"{client_id} gets {format_credits(micro)} credits {_how(period)}. Grant id: {given.grant_id}")
    if not wait:
        typer.echo("The quota worker brings it into the bucket within a second (meterline worker quota).")


@app.command()
def balance(client_id: ClientId, as_json: AsJson = False) -> None:
    """What a client was given, has used, and has left."""
    with open_redis(load_settings().redis) as redis:
        reader = BucketReader(redis, load_settings().redis.namespace)
        bucket = _bucket(reader, client_id)
        is_open = _is_open(reader, bucket)
    facts = _facts(bucket, is_open=is_open)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name in ("granted", "consumed", "provisional", "reserved", "available"):
        typer.echo(f"{name:<12} {facts[name]:>20}")
    typer.echo(f"{'period':<12} {facts['period_start'] or 'none: prepaid':>20}")
    state = "open" if is_open else "closed: it is being rebuilt, each client's policy decides"
    typer.echo(f"{'bucket':<12} {state:>20}, generation {bucket.shard.generation}")


@app.command("list")
def list_buckets(as_json: AsJson = False) -> None:
    """The buckets of all clients."""
    settings = load_settings().redis
    with open_redis(settings) as redis:
        reader = BucketReader(redis, settings.namespace)
        rows = []
        for client_id in sorted(reader.client_ids()):
            bucket = reader.bucket(client_id)
            if bucket is not None:
                rows.append(_facts(bucket, is_open=_is_open(reader, bucket)))
    if as_json:
        typer.echo(json.dumps(rows))
        return
    if not rows:
        typer.echo(
            "No client has a bucket. Give credits: meterline quota grant CLIENT CREDITS --reason ...\n"
            "They arrive while a quota worker runs: meterline worker quota"
        )
        return
    table = Table("client")
    for name in ("granted", "consumed", "provisional", "reserved", "available"):
        table.add_column(name, justify="right")
    table.add_column("period since")
    table.add_column("bucket")
    for row in rows:
        amounts = (row[name] for name in ("granted", "consumed", "provisional", "reserved", "available"))
        table.add_row(
            row["client_id"], *amounts, row["period_start"] or "prepaid", "open" if row["open"] else "closed"
        )
    Console(markup=False).print(table)


@app.command()
def reservations(client_id: ClientId, as_json: AsJson = False) -> None:
    """What is held for running work, and settled work that never reached the log."""
    settings = load_settings()
    with open_redis(settings.redis) as redis:
        bucket = _bucket(BucketReader(redis, settings.redis.namespace), client_id)
    held = sorted(
        (one for one in bucket.reservations.values() if one.state == "held"), key=lambda one: one.time
    )
    ended = [one for one in bucket.reservations.values() if one.state != "held"]
    shard = bucket.shard
    progress = {
        source: (until, shard.published_until.get(source, -1))
        for source, until in shard.accounted_until.items()
    }
    with LedgerAsker(settings.clickhouse) as ledger:
        lost = lost_work(ledger, client_id, ended, progress)
    now = _now_ms()
    if as_json:
        answer = {
            "held": [_held_facts(one, now) for one in held],
            "never_reached_the_log": [_lost_facts(one) for one in lost],
        }
        typer.echo(json.dumps(answer))
        return
    _print_held(held, now)
    _print_lost(lost)


app.command()(void)
app.command()(rebuild)
app.command()(check)


def _amount(text: str, *, budget: bool) -> int:
    try:
        micro = to_micro(text)
    except ValueError as error:
        raise UserError(f"{error}. Write credits as 1000 or 0.25.") from None
    if micro < 0 or (micro == 0 and not budget):
        raise UserError(
            f"A grant gives more than 0 credits, not {text}. To correct what was used, publish a correcting "
            "event; to end a budget, give a budget of 0."
        )
    return micro


def _period(settings: Settings, client_id: str, since: str) -> Period:
    """The billing period a budget begins with, by the client's registry record."""
    moment = _now_ms()
    if since:
        try:
            day = datetime.fromisoformat(since)
        except ValueError:
            raise UserError(f"--from {since!r} is not ISO 8601; write for example 2026-12-01") from None
        moment = int((day if day.tzinfo else day.replace(tzinfo=UTC)).timestamp() * 1000)
    with ClientRegistry(settings) as registry:
        registry.wait_until_caught_up(READ_S_MAX)
        return period_of(registry.get(client_id) or Client(client_id), moment)


def _wait_until_usable(settings: RedisSettings, given: CreditGrant) -> None:
    """Until the bucket has the grant, or is in the budget's first period, and decides.

    Raises:
        UserError: not within `USABLE_S_MAX`; the grant is on the log all the same.
    """
    deadline = time.monotonic() + USABLE_S_MAX
    with open_redis(settings) as redis:
        reader = BucketReader(redis, settings.namespace)
        while time.monotonic() < deadline:
            bucket = reader.bucket(given.client_id)
            if bucket is not None and _is_open(reader, bucket):
                if given.period_start is None:
                    is_there = reader.has_grant(given.client_id, given.grant_id)
                else:
                    is_there = (bucket.period_start or 0) >= given.period_start
                if is_there:
                    return
            time.sleep(LOOK_S)
    raise UserError(
        f"The grant {given.grant_id} is on the log, but not in the bucket after {USABLE_S_MAX:.0f} s. Do a "
        "quota and a metering worker run? (meterline worker quota, meterline worker metering)"
    )


def _how(period: Period | None) -> str:
    if period is None:
        return "until they are used"
    return (
        f"in each billing period, first in the one from {_utc(period.start)} "
        "(a period that began with a budget keeps it)"
    )


def _bucket(reader: BucketReader, client_id: str) -> Bucket:
    bucket = reader.bucket(client_id)
    if bucket is None:
        typer.echo(
            f"Error: {client_id!r} has no bucket. Was anything granted, and does a quota worker run? "
            "meterline quota grant, meterline worker quota",
            err=True,
        )
        raise typer.Exit(1)
    return bucket


def _is_open(reader: BucketReader, bucket: Bucket) -> bool:
    return bucket.shard.is_open and reader.is_believed(bucket.shard)


def _facts(bucket: Bucket, *, is_open: bool) -> dict[str, Any]:
    """A bucket in credits, as text: JSON's numbers are floats to many programs."""
    return {
        "client_id": bucket.client_id,
        "granted": format_credits(bucket.granted_micro),
        "consumed": format_credits(bucket.consumed_micro),
        "provisional": format_credits(bucket.provisional_micro),
        "reserved": format_credits(bucket.held_micro),
        "available": format_credits(bucket.available_micro),
        "open": is_open,
        "generation": bucket.shard.generation,
        "period_start": None if bucket.period_start is None else _utc(bucket.period_start),
    }


def _held_facts(one: Reservation, now: int) -> dict[str, Any]:
    return {
        "reservation_id": one.reservation_id,
        "kind": "lease" if one.seq else "reservation",
        "reserved": format_credits(one.reserved_micro),
        "holds": format_credits(one.hold_micro),
        "settled_parts": len(one.parts),
        "deadline": _utc(one.time),
        "seconds_left": round((one.time - now) / 1000, 1),
    }


def _lost_facts(one: LostReservation) -> dict[str, Any]:
    return {
        "reservation_id": one.reservation_id,
        "topic_id": one.topic_id,
        "partition": one.partition,
        "offset": one.offset,
        "credits": format_credits(one.credits_micro),
    }


def _print_held(held: Iterable[Reservation], now: int) -> None:
    table = Table("reservation", "kind")
    for name in ("reserved", "still holds", "parts"):
        table.add_column(name, justify="right")
    table.add_column("deadline")
    for one in held:
        left = (one.time - now) / 1000
        until = f"in {left:.0f} s" if left >= 0 else f"{-left:.0f} s ago: held until the log has passed it"
        facts = _held_facts(one, now)
        table.add_row(
            one.reservation_id, facts["kind"], facts["reserved"], facts["holds"], str(len(one.parts)), until
        )
    if table.row_count:
        Console(markup=False).print(table)
    else:
        typer.echo("Nothing is held.")


def _print_lost(lost: Iterable[LostReservation]) -> None:
    for one in lost:
        typer.echo(
            f"settled, and not in the ledger: {one.reservation_id}, {format_credits(one.credits_micro)} "
            f"credits at {one.topic_id}/{one.partition}/{one.offset} "
            "(a duplicate, a conflict, a dead letter, or lost)"
        )


def _utc(t_ms: int) -> str:
    return iso(datetime.fromtimestamp(t_ms / 1000, UTC))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
