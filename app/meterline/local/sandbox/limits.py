"""Stripe's numbers, and the checks that need nothing but a value and a clock.

Times are Unix seconds, Stripe's resolution. Sources are Stripe's public API reference, changelog and
observations of its real answers; each rule names its own.
"""

from __future__ import annotations

import re
from decimal import Decimal

from meterline.local.sandbox.errors import StripeError

__all__ = [
    "EVENT_NAME_LENGTH_MAX",
    "IDEMPOTENCY_KEY_LENGTH_MAX",
    "IDENTIFIER_LENGTH_MAX",
    "KEY_REMEMBERED_S",
    "V2_KEY_REMEMBERED_S",
    "check_timestamp",
    "parse_value",
    "still_cancellable",
    "still_remembered",
]

MINUTE_S = 60
DAY_S = 86_400

IDENTIFIER_LENGTH_MAX = 100
"""Characters of a meter event's identifier (Stripe's OpenAPI description)."""
EVENT_NAME_LENGTH_MAX = 100
"""Characters of a meter's event name (Stripe's OpenAPI description)."""
IDEMPOTENCY_KEY_LENGTH_MAX = 255
"""Characters of an Idempotency-Key (docs.stripe.com/api/idempotent_requests)."""

IDENTIFIER_REMEMBERED_S = DAY_S
KEY_REMEMBERED_S = DAY_S
V2_KEY_REMEMBERED_S = 30 * DAY_S
"""How long identifiers and idempotency keys are known. Stripe promises "at least 24 hours" for both, and 30
days for keys of API v2; a sender may rely on no second more."""
CANCELLABLE_S = DAY_S
PAST_MAX_S = 35 * DAY_S
FUTURE_MAX_S = 5 * MINUTE_S
"""A meter event's timestamp: within the past 35 days and at most 5 minutes ahead (API reference)."""
SIGNIFICANT_DIGITS_MAX = 15
"""Digits of a value since API 2026-04-22.dahlia; more are refused (Stripe's changelog)."""
VALUE_LENGTH_MAX = 64
"""Characters of a value: our own bound, so that exact sums have a bounded precision."""

_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?", re.ASCII)


def still_remembered(first_seen: int, now: int, remembered_s: int = IDENTIFIER_REMEMBERED_S) -> bool:
    """Whether an identifier or key first seen at a time is still known.

    Clocks are whole seconds, so the 86,400th is included: 24 hours never come out a fraction short.
    """
    return now - first_seen <= remembered_s


def still_cancellable(received_at: int, now: int) -> bool:
    """Whether an event may be cancelled: within 24 hours of its receipt (API reference, adjustments)."""
    return now - received_at <= CANCELLABLE_S


def check_timestamp(timestamp: int, now: int) -> None:
    """Refuse a meter event that is too old or too far ahead; both edges are inside.

    Raises:
        StripeError: 400. The text for old ones is Stripe's own, observed on real accounts, up to the bound.
    """
    oldest = now - PAST_MAX_S
    if timestamp < oldest:
        raise StripeError(
            400,
            "The event timestamp cannot be more than 35 days in past. "
            f"Expected a timestamp greater than or equal to {oldest}.",
            param="timestamp",
            report_code="timestamp_too_far_in_past",
        )
    if timestamp > now + FUTURE_MAX_S:
        raise StripeError(
            400,
            "The event timestamp cannot be more than 5 minutes in the future. "
            f"Expected a timestamp less than or equal to {now + FUTURE_MAX_S}.",
            param="timestamp",
            report_code="timestamp_in_future",
        )


def parse_value(text: str) -> Decimal:
    """The exact value of a meter event.

    Plain decimals only: whether Stripe reads exponents is documented nowhere. Negative values are allowed
    (they correct usage that was recorded wrongly). Every digit after leading zeros counts as significant,
    trailing zeros too: the strictest reading of the 15-digit rule.

    Raises:
        StripeError: 400.
    """
    if len(text) > VALUE_LENGTH_MAX or not _DECIMAL.fullmatch(text):
        raise StripeError(
            400,
            f"Invalid meter event value: {text[:VALUE_LENGTH_MAX]}",
            param="payload",
            report_code="meter_event_invalid_value",
        )
    digits = text.removeprefix("-").replace(".", "").lstrip("0")
    if len(digits) > SIGNIFICANT_DIGITS_MAX:
        raise StripeError(
            400,
            f"The meter event value has {len(digits)} significant digits; at most "
            f"{SIGNIFICANT_DIGITS_MAX} are allowed.",
            param="payload",
            report_code="meter_event_value_too_many_digits",
        )
    return Decimal(text)
