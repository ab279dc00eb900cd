"""`meterline quota void|rebuild`: what a person orders. Who and why are in the ledger before it is done."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer

from meterline.cli.period import iso
from meterline.cli.who import By, check_reason, person
from meterline.domain.credits import format_credits
from meterline.errors import UserError
from meterline.ledger.asker import LedgerAsker
from meterline.ledger.quota_changes import QuotaChange, write_change
from meterline.quota.inspect import BucketReader, Reservation, Shard, open_redis
from meterline.quota.shards import open_shards
from meterline.settings import ClickHouseSettings, RedisSettings, load_settings

__all__ = ["rebuild", "void"]

HEARTBEAT_S_MAX = 15.0
"""A running quota worker writes a heartbeat each second; while it rebuilds it is silent for longer."""
LOOK_S = 0.5
BEYOND_LONGEST_S = 120
"""What a rebuild takes beyond the longest reservation: reading two topics, and the margin of the clocks."""
INTERRUPTED_CODE = 1

Reason = Annotated[str, typer.Option(help="Why; it is kept in the ledger.")]


def void(
    client_id: Annotated[str, typer.Argument(metavar="CLIENT", help="The client's id.")],
    reservation_id: Annotated[str, typer.Argument(metavar="RESERVATION", help="The reservation's id.")],
    reason: Reason,
    by: By = "",
) -> None:
    """Give back what a reservation holds, for work that will never be done.

    If the work is published all the same, the log charges it, without credits set aside for it.
    """
    settings = load_settings()
    held = _held(settings.redis, client_id, reservation_id)
    with _recorded(
        settings.clickhouse,
        _ordered(
            "void",
            reason,
            by,
            client_id=client_id,
            reservation_id=reservation_id,
            credits_micro=held.hold_micro,
        ),
    ) as outcome:
        answer = asyncio.run(_void(settings.redis, client_id, reservation_id))
        outcome.append(
            {
                "ok": "voided",
                "s": "settled meanwhile, or parts were settled: the rest was given back",
                "u": "forgotten meanwhile",
            }.get(answer, answer)
        )
    what = "lease" if held.seq else "reservation"
    typer.echo(
        f"{what} {reservation_id} of {client_id}, {format_credits(held.hold_micro)} credits: {outcome[0]}."
    )


def rebuild(
    reason: Reason,
    by: By = "",
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout-s", min=1, help="Wait so long; default: the longest reservation and 2 min."),
    ] = None,
) -> None:
    """Compute every bucket anew from credit.grants and usage.totals, under a new generation.

    The running quota worker does it. Until it is done the buckets are closed: each client's policy decides.
    """
    settings = load_settings()
    limit_s = timeout_s or settings.quota.reservation_ttl_max_s + BEYOND_LONGEST_S
    with open_redis(settings.redis) as redis:
        reader = BucketReader(redis, settings.redis.namespace)
        shards = _with_a_worker(reader)
        former = max(shard.generation for shard in shards)
        if not all(shard.is_open for shard in shards):
            typer.echo(f"Generation {former} is closed: a rebuild is under way. Waiting for it.")
            _wait_until_open(reader, former, limit_s)
            return
        with _recorded(settings.clickhouse, _ordered("rebuild", reason, by)) as outcome:
            # A shard without state is one of a lost Redis: the worker begins a new generation for them all.
            reader.forget_state(shards[0])
            outcome.append(f"ordered; generation {former} was given up")
        typer.echo(f"Generation {former} is given up; the quota worker begins a new one.")
        _wait_until_open(reader, former + 1, limit_s)


def _held(settings: RedisSettings, client_id: str, reservation_id: str) -> Reservation:
    with open_redis(settings) as redis:
        bucket = BucketReader(redis, settings.namespace).bucket(client_id)
    one = None if bucket is None else bucket.reservations.get(reservation_id)
    if one is None:
        problem = "is not known (never made, or ended more than a day ago)"
    elif one.state != "held":
        problem = f"is {one.state}: it holds nothing"
    else:
        return one
    typer.echo(
        f"Error: reservation {reservation_id!r} of {client_id!r} {problem}. Those that hold something: "
        f"meterline quota reservations {client_id}",
        err=True,
    )
    raise typer.Exit(1)


async def _void(settings: RedisSettings, client_id: str, reservation_id: str) -> str:
    shards = await open_shards(settings)
    try:
        ((answer,),) = await shards.run([(client_id, [["v", reservation_id]])])
    finally:
        await shards.close()
    return answer


def _ordered(action: str, reason: str, by: str, **about: str | int) -> QuotaChange:
    check_reason(reason, "worker lost with its machine")
    return QuotaChange(
        change_id=uuid.uuid4().hex,
        changed_at=time.time_ns() // 1_000_000,
        action=action,
        changed_by=person(by),
        reason=reason,
        **about,  # type: ignore[arg-type]  # names of its fields
    )


@contextmanager
def _recorded(settings: ClickHouseSettings, change: QuotaChange) -> Iterator[list[str]]:
    with LedgerAsker(settings) as ledger, ledger.recorded(write_change, change) as outcome:
        yield outcome


def _with_a_worker(reader: BucketReader) -> Sequence[Shard]:
    """The shards, if a quota worker writes its heartbeat into them.

    Raises:
        UserError: none does: a rebuild that is ordered now would keep the buckets closed.
    """
    first = reader.shards()
    deadline = time.monotonic() + HEARTBEAT_S_MAX
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        now = reader.shards()
        if any(
            (after.generation, after.beat) != (before.generation, before.beat)
            for before, after in zip(first, now, strict=True)
        ):
            return now
    raise UserError(
        f"No quota worker runs: no heartbeat for {HEARTBEAT_S_MAX:.0f} s. Nothing was changed. "
        "Start one (meterline worker quota): after a lost Redis it rebuilds by itself."
    )


def _wait_until_open(reader: BucketReader, generation: int, limit_s: float) -> None:
    """Tell what the worker does, until every shard is open under this generation or a later one."""
    deadline = time.monotonic() + limit_s
    told = ""
    while True:
        shards = reader.shards()
        if all(shard.generation >= generation and shard.is_open for shard in shards):
            typer.echo(f"Generation {shards[0].generation} is open.")
            return
        if (state := _state(shards, generation)) != told:
            typer.echo(state)
            told = state
        if time.monotonic() > deadline:
            typer.echo(
                f"Error: not open after {limit_s:.0f} s. The quota worker goes on by itself: see its log, "
                "and whether metering runs: its clock must pass the longest reservation.",
                err=True,
            )
            raise typer.Exit(INTERRUPTED_CODE)
        time.sleep(LOOK_S)


def _state(shards: Sequence[Shard], generation: int) -> str:
    begun = [shard for shard in shards if shard.generation >= generation]
    if len(begun) < len(shards):
        return "Waiting for a new generation to begin."
    times = [shard.log_time for shard in shards]
    known = [moment for moment in times if moment is not None]
    number = begun[0].generation
    if len(known) < len(times):
        return f"Generation {number} has begun, closed; totals and grants are being applied."
    # By the minute: each line tells something new, and a rebuild of minutes prints a few.
    minute = datetime.fromtimestamp(min(known) / 1000, UTC).replace(second=0, microsecond=0)
    return (
        f"Generation {number}: accounted up to {iso(minute)}; opens when the longest reservation has passed."
    )
