"""Stripe's numbers, at their edges, with a given clock."""

from __future__ import annotations

from decimal import Decimal

import pytest

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.limits import check_timestamp, parse_value, still_remembered

NOW = 1_795_000_000
DAY_S = 86_400


@pytest.mark.parametrize(("age_s", "remembered"), [(0, True), (DAY_S, True), (DAY_S + 1, False)])
def test_identifiers_and_keys_are_known_for_24_hours_and_no_longer(age_s, remembered):
    """ "At least 24 hours": the last second of them is inside, the next is not promised."""
    assert still_remembered(NOW - age_s, NOW) is remembered


@pytest.mark.parametrize("offset_s", [-35 * DAY_S, -1, 0, 1, 300])
def test_timestamps_from_35_days_back_to_5_minutes_ahead_are_taken(offset_s):
    """Both edges are inside."""
    check_timestamp(NOW + offset_s, NOW)


def test_a_timestamp_one_second_too_old_is_refused_with_stripes_text():
    """Stripe's observed sentence names the bound."""
    with pytest.raises(StripeError) as refused:
        check_timestamp(NOW - 35 * DAY_S - 1, NOW)

    assert refused.value.status == 400
    assert refused.value.message == (
        "The event timestamp cannot be more than 35 days in past. "
        f"Expected a timestamp greater than or equal to {NOW - 35 * DAY_S}."
    )


def test_a_timestamp_one_second_too_far_ahead_is_refused():
    """5 minutes and 1 second ahead of Stripe's clock."""
    with pytest.raises(StripeError, match="5 minutes in the future"):
        check_timestamp(NOW + 301, NOW)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", "0"),
        ("25", "25"),
        ("-25", "-25"),
        ("17.25", "17.25"),
        ("999999999999999", "999999999999999"),
        ("-0.00123456789012345", "-0.00123456789012345"),
        ("000000000000000000001", "1"),
    ],
)
def test_plain_decimals_of_up_to_15_significant_digits_are_exact(text, value):
    """Sign, point and leading zeros are no digits."""
    assert parse_value(text) == Decimal(value)


@pytest.mark.parametrize(
    "text", ["1000000000000000", "1234567890.123456", "-0.1000000000000000", "9999999999999999"]
)
def test_16_significant_digits_are_refused(text):
    """Trailing zeros count: the strictest reading of the rule of API 2026-04-22.dahlia."""
    with pytest.raises(StripeError, match="16 significant digits"):
        parse_value(text)


@pytest.mark.parametrize(
    "text", ["", "abc", "1e3", "1E-8", "+1", "1.", ".5", " 1", "NaN", "Infinity", "1_0", "٣"]
)
def test_anything_but_a_plain_decimal_is_refused(text):
    """No exponents, no names of numbers, no digits of other scripts."""
    with pytest.raises(StripeError, match="Invalid meter event value"):
        parse_value(text)
