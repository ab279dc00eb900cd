"""Makes a checked `UsageEvent` of what a worker says it has done."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from meterline.domain.credits import to_micro
from meterline.domain.events import UsageEvent, check_event, default_event_id
from meterline.domain.reasons import Reason
from meterline.errors import DeadLetterError
from meterline.producer.errors import InvalidUsage

__all__ = ["build_event", "require_valid"]

ITEM_MAX = 2**63 - 1
"""Programs in other languages make the same event id of it, and count in 64 bits."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

_REMEDIES = {
    Reason.INVALID_FIELD: "Give a value within the limits of the usage event.",
    Reason.NEGATIVE_CREDITS: "To take usage back, publish a correction that names the event.",
    Reason.CREDITS_OUT_OF_RANGE: "Check the unit: credits, not micro-credits.",
    Reason.TIME_IN_FUTURE: "Check this machine's clock and the time zone of occurred_at.",
}


def build_event(
    *,
    client_id: str,
    correlation_id: str,
    sku: str,
    credits: Decimal | int | str,  # noqa: A002 - the domain's word; nobody calls the interpreter's credits()
    item: int = 0,
    occurred_at: datetime | None = None,
    attributes: Mapping[str, str] | None = None,
    event_id: str | None = None,
    source: str = "",
    reservation_id: str | None = None,
    billable: bool = True,
    now_ms: int,
) -> UsageEvent:
    """A usage event that metering will accept, as far as the event alone can tell.

    Args:
        item: tells apart several charges of one task in one SKU; part of the default event id.
        event_id: the caller's own id; None: deterministic from client, correlation id, SKU and item.
        now_ms: wall time in milliseconds; also the event's time when `occurred_at` is None.

    Raises:
        InvalidUsage: says which value is wrong and what to do.
    """
    _require_text(("client_id", "correlation_id", "sku", "source"), (client_id, correlation_id, sku, source))
    if event_id is None:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= ITEM_MAX:
            raise InvalidUsage(f"item must be a whole number from 0 to {ITEM_MAX}, not {_shown(item)}")
        event_id = default_event_id(client_id, correlation_id, sku, item)
    else:
        _require_text(("event_id",), (event_id,))
        if item:
            raise InvalidUsage("item is part of the default event id: give item or event_id, not both")
    if reservation_id is not None:
        _require_text(("reservation_id",), (reservation_id,))
    if not isinstance(billable, bool):
        raise InvalidUsage(f"billable must be True or False, not {billable!r}")
    if attributes:
        attributes = _text_attributes(attributes)
    try:
        credits_micro = to_micro(credits)
    except ValueError as error:
        raise InvalidUsage(str(error)) from None
    event = UsageEvent(
        event_id=event_id,
        client_id=client_id,
        correlation_id=correlation_id,
        sku=sku,
        credits_micro=credits_micro,
        occurred_at=now_ms if occurred_at is None else _milliseconds(occurred_at),
        source=source,
        attributes=attributes or {},
        reservation_id=reservation_id,
        billable=billable,
    )
    require_valid(event, now_ms)
    return event


def require_valid(event: UsageEvent, now_ms: int) -> None:
    """Metering's own rules, applied before the event leaves; the local clock stands for the broker's.

    Raises:
        InvalidUsage: metering would make this event a dead letter.
    """
    try:
        check_event(event, now_ms)
    except DeadLetterError as error:
        raise InvalidUsage(f"{error.detail}. {_REMEDIES[Reason(error.reason)]}") from None


def _require_text(names: tuple[str, ...], values: tuple[str, ...]) -> None:
    """Strings that have a UTF-8 form. Judged together, because nearly always all of them are plain."""
    try:
        if "".join(values).isascii():
            return
    except TypeError:
        name, value = next((n, v) for n, v in zip(names, values, strict=True) if not isinstance(v, str))
        raise InvalidUsage(f"{name} must be a string, not {type(value).__name__}") from None
    for name, value in zip(names, values, strict=True):
        _require_unicode(name, value)


def _require_unicode(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidUsage(f"{name} {value!r} is not valid Unicode; decode the input as UTF-8") from None


def _text_attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    """A copy: the caller may go on changing its own mapping."""
    if not isinstance(attributes, dict | Mapping):  # dict first: asking an abstract class takes longer
        raise InvalidUsage(f"attributes must map strings to strings, not be a {type(attributes).__name__}")
    for key, value in attributes.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidUsage(f"attribute {key!r}: {value!r} must be a string; convert it first, with str()")
        _require_text(("attribute", "attribute"), (key, value))
    return dict(attributes)


def _shown(item: object) -> str:
    """Python refuses to write an integer of thousands of digits."""
    return "a larger one" if isinstance(item, int) and item > ITEM_MAX else repr(item)


def _milliseconds(moment: datetime) -> int:
    if not isinstance(moment, datetime):
        raise InvalidUsage(f"occurred_at must be a datetime with a time zone, not {type(moment).__name__}")
    if moment.tzinfo is None:
        raise InvalidUsage(
            f"occurred_at {moment.isoformat()} has no time zone; use datetime.now(UTC) or add tzinfo"
        )
    return (moment - _EPOCH) // _MILLISECOND
