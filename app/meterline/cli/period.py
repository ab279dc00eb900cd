"""The options `--since` and `--until` of commands that report about a period."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from meterline.errors import UserError
from meterline.ledger.reports import Period

__all__ = ["Since", "Until", "iso", "parse_period"]

DEFAULT_LENGTH_MS = 35 * 86_400_000
"""A billing month and a few days: what one invoice can be about."""

Since = Annotated[
    str, typer.Option(help="First moment, e.g. 2026-11-01 or 2026-11-01T12:30 (UTC). Default: 35 days ago.")
]
Until = Annotated[str, typer.Option(help="First moment that no longer counts. Default: everything since.")]


def parse_period(since: str, until: str) -> Period:
    """The period two options name.

    Raises:
        UserError: a time is unreadable, or the period is empty.
    """
    now_ms = time.time_ns() // 1_000_000
    # Without --until nothing is cut off: an event may be a few minutes ahead of this machine's clock.
    until_ms = _milliseconds("--until", until) if until else now_ms + DEFAULT_LENGTH_MS
    since_ms = _milliseconds("--since", since) if since else min(now_ms, until_ms) - DEFAULT_LENGTH_MS
    if since_ms >= until_ms:
        raise UserError(f"The period is empty: --since {since} is not before --until {until}.")
    return Period(since_ms, until_ms)


def iso(moment: datetime) -> str:
    """A UTC time for people and programs: milliseconds only where there are any."""
    spec = "milliseconds" if moment.microsecond else "seconds"
    return moment.replace(tzinfo=None).isoformat(timespec=spec) + "Z"


def _milliseconds(option: str, text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{option} {text!r} is no time. Write 2026-11-01 or 2026-11-01T12:30:00.") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)
