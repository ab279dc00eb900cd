"""The columns of a usage file, and the usage event in one row of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from meterline.domain.events import UsageEvent
from meterline.errors import UserError
from meterline.producer.errors import InvalidUsage
from meterline.producer.events import build_event

__all__ = ["COLUMNS", "REQUIRED_COLUMNS", "event_of_row", "require_columns"]

REQUIRED_COLUMNS = ("client_id", "correlation_id", "sku", "credits")
COLUMNS = (
    *REQUIRED_COLUMNS,
    "item",
    "occurred_at",
    "event_id",
    "source",
    "reservation_id",
    "billable",
    "attributes",
)
ATTRIBUTE_PREFIX = "attributes."
"""A column `attributes.model` is the attribute `model`."""

EPOCH_MS_MIN = 10**11
"""Milliseconds since 1970 reach this in March 1973; a smaller number is a time in seconds, or a date."""

DIGITS_MAX = 19
"""Those of the largest 64-bit integer: no item and no time has more."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def require_columns(names: Sequence[str]) -> None:
    """Whether these are the columns of a usage file.

    Raises:
        UserError: one is unknown, missing, or there twice.
    """
    unknown = [
        n for n in names if n not in COLUMNS and (not n.startswith(ATTRIBUTE_PREFIX) or n == ATTRIBUTE_PREFIX)
    ]
    if unknown:
        raise UserError(
            f"unknown column {', '.join(map(repr, unknown))}. Known: {', '.join(COLUMNS)}, attributes.NAME"
        )
    missing = [name for name in REQUIRED_COLUMNS if name not in names]
    if missing:
        raise UserError(f"missing column {', '.join(map(repr, missing))}")
    if len(set(names)) != len(names):
        raise UserError(f"the column {next(n for n in names if names.count(n) > 1)!r} is there twice")


def event_of_row(columns: Mapping[str, Any], now_ms: int) -> UsageEvent:
    """The event of one row: texts from CSV, values from JSON. An empty optional column is its default.

    Raises:
        UserError: the columns are not those of an event.
        InvalidUsage: a value is wrong.
    """
    require_columns(tuple(columns))
    given = {name: value for name, value in columns.items() if value is not None and value != ""}
    for name in REQUIRED_COLUMNS:
        if name not in given:
            raise InvalidUsage(f"{name} is empty")
    return build_event(
        client_id=given["client_id"],
        correlation_id=given["correlation_id"],
        sku=given["sku"],
        credits=given["credits"],
        item=_item(given.get("item", 0)),
        occurred_at=_moment(given["occurred_at"]) if "occurred_at" in given else None,
        attributes=_attributes(given),
        event_id=given.get("event_id"),
        source=given.get("source", ""),
        reservation_id=given.get("reservation_id"),
        billable=_truth(given.get("billable", True)),
        now_ms=now_ms,
    )


def _item(value: object) -> Any:
    """An int where a text says one; anything else is left for the event's own check."""
    return int(value) if isinstance(value, str) and _is_whole(value) else value


def _is_whole(text: str) -> bool:
    """Digits, and not so many of them that Python refuses to count them."""
    return text.isascii() and text.isdecimal() and len(text) <= DIGITS_MAX


def _truth(value: object) -> Any:
    return _TRUTHS.get(value.lower(), value) if isinstance(value, str) else value


def _moment(value: object) -> datetime:
    if isinstance(value, str) and not _is_whole(value):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            raise InvalidUsage(
                f"occurred_at {value!r} is neither ISO 8601 (2026-11-24T10:15:00Z) nor epoch milliseconds"
            ) from None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidUsage(f"occurred_at {value!r} must be an ISO 8601 text or whole epoch milliseconds")
    epoch_ms = int(value)
    if epoch_ms < EPOCH_MS_MIN:
        raise InvalidUsage(f"occurred_at {epoch_ms} is too small for epoch milliseconds; is it in seconds?")
    try:
        return _EPOCH + timedelta(milliseconds=epoch_ms)
    except OverflowError:
        raise InvalidUsage(f"occurred_at {epoch_ms} ms is after the year 9999") from None


def _attributes(given: Mapping[str, Any]) -> dict[str, str]:
    value = given.get("attributes", {})
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidUsage(f"attributes is not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise InvalidUsage("attributes is not a JSON object")
    value = dict(value)
    for name, text in given.items():
        if name.startswith(ATTRIBUTE_PREFIX):
            key = name.removeprefix(ATTRIBUTE_PREFIX)
            if key in value:
                raise InvalidUsage(f"the attribute {key!r} is given twice")
            value[key] = text
    return value
