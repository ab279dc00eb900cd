"""Moments as people and API v2 write them, and as Unix seconds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from meterline.local.sandbox.errors import StripeError

__all__ = ["parse_moment", "rfc3339", "seconds"]


def parse_moment(value: Any) -> float:
    """Unix seconds, from a number or from ISO 8601 (UTC where it names no zone); raises StripeError 400."""
    try:
        if isinstance(value, str) and not value.isdecimal():
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        return seconds(int(value) if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        raise StripeError(400, f"Not a time: {value!r}. Send Unix seconds or ISO 8601.") from None


def rfc3339(moment: int) -> str:
    """A moment as API v2 writes it."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def seconds(value: Any) -> float:
    """A JSON number of seconds that isn't negative; raises StripeError 400."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise StripeError(400, f"Not a number of seconds: {value!r}.")
    return float(value)
