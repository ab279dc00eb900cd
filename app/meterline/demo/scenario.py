"""What the demo publishes: tasks and their prices, and the trouble a real week brings.

Three files, which with `tasks.csv` of `demo.tasks` are all that the checker knows of the input:

    usage.csv      rows for `meterline publish`: tasks, resends, retries with another time, late tasks
    poison.jsonl   records no producer library would make: base64 key and value, and the reason to expect
    grants.csv     credits for every client; for one of them too few
"""

from __future__ import annotations

import base64
import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_to_record
from meterline.demo.traces import Request
from meterline.domain.events import UsageEvent, default_event_id
from meterline.domain.reasons import Reason

__all__ = ["PRICES", "Scenario", "client_of", "clients_of", "write_scenario"]

PRICES = {
    ("code", "prompt-token"): Decimal("0.0003"),
    ("code", "generated-token"): Decimal("0.0012"),
    ("conv", "prompt-token"): Decimal("0.0002"),
    ("conv", "generated-token"): Decimal("0.0008"),
}
"""Credits for one token, by service and SKU."""

CLIENTS_PER_SERVICE = 4

TRIAL_CREDITS = 100
"""What the client of `demo.tasks` may use: it runs out."""
GENEROSITY = 2
"""The others get so many times what their input costs: nobody asks for them before the work."""

RESENT_SHARE = 0.005
RETRIED_SHARE = 0.002
LATE_SHARE = 0.002
LATE_BY = timedelta(minutes=12)
LATE_AFTER_ROWS = 3_000
"""A late task is published this many rows after its time: its window closed long ago."""

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Where the input stands, and whose it is.

    Attributes:
        without_customer: has no Stripe customer.
        trial: its credits run out.
    """

    usage_file: Path
    poison_file: Path
    grants_file: Path
    clients: Sequence[str]
    without_customer: str
    trial: str
    started_at: datetime
    ended_at: datetime


def clients_of(run_id: str) -> list[str]:
    """The clients of the traces in one run: no run counts on another one's windows."""
    return [
        f"{service}-{number}.{run_id}"
        for service in ("code", "conv")
        for number in range(CLIENTS_PER_SERVICE)
    ]


def client_of(request: Request, run_id: str) -> str:
    """Whose request it was. The traces name no customer: the row number modulo four, for each service."""
    return f"{request.service}-{request.number % CLIENTS_PER_SERVICE}.{run_id}"


def write_scenario(requests: Sequence[Request], run_id: str, now: datetime, folder: Path) -> Scenario:
    """Write the input of a run: the requests, shifted so that the last minute of usage ended just now."""
    folder.mkdir(parents=True, exist_ok=True)
    shift = now.replace(second=0, microsecond=0) - requests[-1].at - timedelta(milliseconds=1)
    chance = random.Random(run_id)  # noqa: S311 - a sample, no secret
    rows = _with_trouble([row for request in requests for row in _rows(request, run_id, shift)], chance)
    usage_file, poison_file, grants_file = (
        folder / name for name in ("usage.csv", "poison.jsonl", "grants.csv")
    )
    with usage_file.open("w", newline="") as text:
        writer = csv.DictWriter(text, ["client_id", "correlation_id", "sku", "credits", "occurred_at"])
        writer.writeheader()
        writer.writerows(rows)
    clients = clients_of(run_id)
    with poison_file.open("w") as text:
        for poison in _poison(clients[0], rows[0], now):
            text.write(json.dumps(poison) + "\n")
    trial = f"trial.{run_id}"
    with grants_file.open("w", newline="") as text:
        table = csv.writer(text)
        table.writerow(("client_id", "credits"))
        table.writerows((*_grants(rows, clients), (trial, TRIAL_CREDITS)))
    return Scenario(
        usage_file,
        poison_file,
        grants_file,
        [*clients, trial],
        clients[-1],
        trial,
        requests[0].at + shift - LATE_BY,
        requests[-1].at + shift,
    )


def _grants(rows: Sequence[Row], clients: Sequence[str]) -> Iterator[tuple[str, int]]:
    cost = dict.fromkeys(clients, Decimal())
    for row in rows:
        cost[row["client_id"]] += Decimal(row["credits"])
    for client_id, credits_ in cost.items():
        yield client_id, 1 + GENEROSITY * int(credits_)


def _rows(request: Request, run_id: str, shift: timedelta) -> Iterator[Row]:
    """One task charges two SKUs."""
    for sku, tokens in (
        ("prompt-token", request.prompt_tokens),
        ("generated-token", request.generated_tokens),
    ):
        yield {
            "client_id": client_of(request, run_id),
            "correlation_id": f"{run_id}-{request.service}-{request.number}",
            "sku": f"{request.service}.{sku}",
            "credits": str(tokens * PRICES[request.service, sku]),
            "occurred_at": _iso(request.at + shift),
        }


def _with_trouble(rows: list[Row], chance: random.Random) -> list[Row]:
    """Resends are equal rows; a retried task says another time; a late one comes after its window closed."""
    out: list[Row] = []
    late: list[tuple[int, Row]] = []
    for number, row in enumerate(rows):
        luck = chance.random()
        if luck < LATE_SHARE and number + LATE_AFTER_ROWS < len(rows):
            moved = datetime.fromisoformat(row["occurred_at"]) - LATE_BY
            late.append((number + LATE_AFTER_ROWS, row | {"occurred_at": _iso(moved)}))
            continue
        out.append(row)
        if luck > 1 - RESENT_SHARE:
            out.append(row)
        elif luck > 1 - RESENT_SHARE - RETRIED_SHARE:
            moved = datetime.fromisoformat(row["occurred_at"]) + timedelta(seconds=chance.uniform(1, 5))
            out.append(
                row | {"occurred_at": _iso(min(moved, datetime.fromisoformat(rows[-1]["occurred_at"])))}
            )
        while late and late[0][0] <= number:
            out.append(late.pop(0)[1])
    return out + [row for _, row in late]


def _poison(client_id: str, known: Mapping[str, str], now: datetime) -> Iterator[dict[str, Any]]:
    """One of each kind that bad producers send."""
    codec = RecordCodec("usage-event")
    at = int(now.timestamp() * 1000)
    good = UsageEvent("poison", client_id, "poison", "code.prompt-token", 1_000_000, at)
    whole = codec.encode(event_to_record(good))

    def record(reason: Reason, value: bytes) -> dict[str, Any]:
        return {
            "key": base64.b64encode(client_id.encode()).decode(),
            "value": base64.b64encode(value).decode(),
            "reason": reason.value,
        }

    def event(reason: Reason, **changed: Any) -> dict[str, Any]:
        return record(reason, codec.encode(event_to_record(good._replace(event_id=reason.value, **changed))))

    yield record(Reason.UNKNOWN_FRAMING, b'{"client_id": "json is no avro"}')
    yield record(Reason.UNKNOWN_SCHEMA, b"\xc3\x01" + bytes(8) + whole[10:])
    yield record(Reason.UNDECODABLE, whole[:-3])
    yield event(Reason.NEGATIVE_CREDITS, credits_micro=-5)
    yield event(Reason.CREDITS_OUT_OF_RANGE, credits_micro=2**62)
    yield event(Reason.TIME_IN_FUTURE, occurred_at=at + 4 * 365 * 86_400_000)
    yield event(Reason.INVALID_FIELD, client_id="")
    # The id of an event that was accepted, with other credits: the first one stands.
    event_id = default_event_id(known["client_id"], known["correlation_id"], known["sku"])
    conflict = good._replace(
        event_id=event_id, client_id=known["client_id"], sku=known["sku"], credits_micro=999_000_000
    )
    conflicting = record(Reason.CONFLICT, codec.encode(event_to_record(conflict)))
    yield conflicting | {"key": base64.b64encode(known["client_id"].encode()).decode()}


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
