"""`meterline audit twins`: events that were counted twice are found in the ledger and taken back."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from meterline.cli.period import iso
from meterline.domain.credits import format_credits
from meterline.domain.twins import Copy, judge_copies, twin_correction
from meterline.errors import MeterlineError, UserError
from meterline.ledger.client import connect, explained
from meterline.ledger.twins import copied_events
from meterline.producer import UsageProducer
from meterline.settings import ClickHouseSettings, Settings, load_settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Look through the ledger.")

LOOK_BACK = "35d"
"""A billing month and a few days: a later correction could not reach the invoice the twin is on, and a ledger
of years is not read again each hour. A longer one is for a person who has reason to."""
UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
EVERY_S_MIN = 60
"""What was published must be metered before the next look, or it would be published again (harmlessly)."""
TWINS_SHOWN_MAX = 20
"""On a terminal; `--json` has all."""


@app.callback()
def audit() -> None:
    """Look through the ledger."""


@dataclass(slots=True)
class Findings:
    """How much one look has found so far. What it was is printed as it is found: it may be a whole topic."""

    events: int = 0
    """Of which more than one copy was accepted."""
    twins: int = 0
    conflicts: int = 0
    reversed_before: int = 0


@app.command()
def twins(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what is found, publish nothing.")] = False,
    every: Annotated[str, typer.Option(help="Keep running, and look this often, e.g. 1h.")] = "",
    look_back: Annotated[
        str, typer.Option(help="How far back copies were appended that are looked at.")
    ] = LOOK_BACK,
    alive_file: Annotated[
        Path | None, typer.Option(help="With --every: touched after each look, for a health check.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines for programs.")] = False,
) -> None:
    """Find later copies of accepted events and publish a correction for each. Safe at any time, and twice.

    Exit code 1: copies with another payload (conflicts), which are for a person; with --dry-run also twins
    that are not taken back yet.
    """
    settings = load_settings()
    look_back_s = _seconds("--look-back", look_back)
    printer = JsonLines(published=not dry_run) if as_json else Text(published=not dry_run)
    if not every:
        found = _look(settings, look_back_s, printer, dry_run=dry_run)
        raise typer.Exit(1 if found.conflicts or (dry_run and found.twins) else 0)
    every_s = _seconds("--every", every)
    if every_s < EVERY_S_MIN:
        raise UserError(f"--every {every} is too often: at least {EVERY_S_MIN} s, e.g. 1h.")
    with _told_to_stop() as stop:
        while not stop.is_set():
            try:
                _look(settings, look_back_s, printer, dry_run=dry_run)
            except MeterlineError as error:  # a server that is away now is asked again next time
                typer.echo(f"Error: {error}", err=True)
            if alive_file is not None:
                alive_file.touch()
            stop.wait(every_s)


def _look(settings: Settings, look_back_s: int, printer: Printer, *, dry_run: bool) -> Findings:
    """One look; without `dry_run` every correction is acknowledged by Kafka when it returns."""
    found = Findings()
    since_ms = max(0, time.time_ns() // 1_000_000 - look_back_s * 1_000)
    with UsageProducer(settings) as usage:
        for copies in _copied_events(settings.clickhouse, since_ms):
            verdict = judge_copies(copies)
            found.events += 1
            found.reversed_before += len(verdict.reversed_before)
            for copy in verdict.twins:
                found.twins += 1
                if not dry_run:
                    usage.publish_event(twin_correction(copy))
                printer.twin(copy, found.twins)
            for copy in verdict.conflicts:
                found.conflicts += 1
                printer.conflict(copy, verdict.first)
    printer.end(found)
    return found


def _copied_events(settings: ClickHouseSettings, since_ms: int) -> Iterator[list[Copy]]:
    """The ledger's errors are explained here; Kafka's, met by who consumes this, are not the ledger's."""
    with explained(settings), connect(settings) as client:
        yield from copied_events(client, since_ms)


class Printer(Protocol):
    """One form of what a look finds."""

    def twin(self, copy: Copy, number: int) -> None:
        """The n-th later copy, not taken back before."""

    def conflict(self, copy: Copy, first: Copy) -> None:
        """A copy with another payload than the first."""

    def end(self, found: Findings) -> None:
        """The end of a look."""


class Text:
    """For people."""

    def __init__(self, *, published: bool) -> None:
        self._what = "twin, correction published" if published else "twin, not taken back"

    def twin(self, copy: Copy, number: int) -> None:
        """A line each, at first."""
        if number <= TWINS_SHOWN_MAX:
            typer.echo(f"{self._what}: {_line(copy)}")

    def conflict(self, copy: Copy, first: Copy) -> None:
        """A line each: a person must look at all."""
        typer.echo(f"conflict, for a person: {_line(copy)}; the first copy: {_line(first)}")

    def end(self, found: Findings) -> None:
        """The sums."""
        if found.twins > TWINS_SHOWN_MAX:
            typer.echo(f"... and {found.twins - TWINS_SHOWN_MAX} more twins: --json has all")
        typer.echo(
            f"{found.events} events with several copies: twins={found.twins} conflicts={found.conflicts} "
            f"taken back before={found.reversed_before}"
        )


class JsonLines:
    """For programs: an object for each finding, and one with the sums."""

    def __init__(self, *, published: bool) -> None:
        self._published = published

    def twin(self, copy: Copy, number: int) -> None:  # noqa: ARG002 - all are printed
        """One object."""
        about = {"correction": twin_correction(copy).event_id, "published": self._published}
        typer.echo(json.dumps({"type": "twin"} | _facts(copy) | about))

    def conflict(self, copy: Copy, first: Copy) -> None:
        """One object."""
        typer.echo(json.dumps({"type": "conflict"} | _facts(copy) | {"first": _facts(first)}))

    def end(self, found: Findings) -> None:
        """The sums."""
        typer.echo(json.dumps({"type": "end"} | asdict(found)))


def _line(copy: Copy) -> str:
    return (
        f"{copy.client_id} {copy.event_id}, {format_credits(copy.credits_micro)} credits of {copy.sku} at "
        f"{copy.topic_id}/{copy.partition}/{copy.offset}"
    )


def _facts(copy: Copy) -> dict[str, Any]:
    """Times as text, credits in both forms."""
    return {
        "client_id": copy.client_id,
        "event_id": copy.event_id,
        "sku": copy.sku,
        "credits": format_credits(copy.credits_micro),
        "credits_micro": copy.credits_micro,
        "billable": copy.billable,
        "occurred_at": _utc(copy.occurred_at),
        "appended_at": _utc(copy.appended_at),
        "topic_id": copy.topic_id,
        "partition": copy.partition,
        "offset": copy.offset,
    }


def _utc(ms: int) -> str:
    return iso(datetime.fromtimestamp(ms / 1000, UTC))


def _seconds(option: str, text: str) -> int:
    """A length of time: a number and s, m, h or d.

    Raises:
        UserError: it is something else.
    """
    if not (parts := re.fullmatch(r"([1-9]\d{0,6})([smhd])", text)):
        raise UserError(f"{option} {text!r} is no length of time. Write 90s, 30m, 1h or 35d.")
    return int(parts[1]) * UNITS_S[parts[2]]


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM and Ctrl-C: a look that runs is finished first, it takes seconds."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
