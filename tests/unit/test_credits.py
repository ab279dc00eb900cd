"""Credits are exact: what can't be said in whole micro-credits is refused, never rounded."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest

from meterline.domain.credits import CREDITS_MICRO_MAX, format_credits, to_micro


@pytest.mark.parametrize(
    ("amount", "micro"),
    [
        (3, 3_000_000),
        ("17.25", 17_250_000),
        ("0.000001", 1),
        ("-0.5", -500_000),
        (Decimal("1E+3"), 1_000_000_000),
        ("1.0000000", 1_000_000),
        ("1000000000", CREDITS_MICRO_MAX),
    ],
)
def test_amounts_become_exact_micro_credits(amount, micro):
    """An int, a decimal string and a Decimal mean what they say."""
    assert micro == to_micro(amount)


@pytest.mark.parametrize(
    ("amount", "why"),
    [
        (17.25, "must be a Decimal"),
        (True, "must be a Decimal"),
        (None, "must be a Decimal"),
        ("0.0000001", "finer than a micro-credit"),
        ("1000000000.000001", "more than 1000000000"),
        ("-1000000001", "more than 1000000000"),
        ("seventeen", "not a decimal number"),
        ("", "not a decimal number"),
        ("NaN", "not a finite number"),
        (Decimal("Infinity"), "not a finite number"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_reason(amount, why):
    """Floats are inexact, finer amounts would be rounded, larger ones could overflow a sum."""
    with pytest.raises(ValueError, match=why):
        to_micro(amount)


@pytest.mark.parametrize(
    ("amount", "why"),
    [
        ("1." + "0" * 40 + "1", "finer than a micro-credit"),
        ("-0." + "0" * 40 + "1", "finer than a micro-credit"),
        ("1E-999999999999", "finer than a micro-credit"),
        ("1000000000." + "0" * 40 + "1", "more than 1000000000"),
        ("1E+999999999999", "more than 1000000000"),
    ],
)
def test_an_amount_with_more_digits_than_decimals_context_is_not_rounded(amount, why):
    """The rule holds for any number of digits, not only for those that fit the default context."""
    with pytest.raises(ValueError, match=why):
        to_micro(amount)


def test_a_callers_decimal_context_changes_nothing():
    """A program that computes with few digits still pays the exact amount."""
    with localcontext(prec=3):
        assert to_micro("123456789.123456") == 123_456_789_123_456
    assert to_micro("1." + "0" * 60) == 1_000_000


@pytest.mark.parametrize(
    ("micro", "text"),
    [(17_250_000, "17.25"), (0, "0"), (-1, "-0.000001"), (3_000_000, "3"), (100_000_000, "100")],
)
def test_credits_are_written_without_trailing_zeros(micro, text):
    """The zeros of a whole number stay."""
    assert text == format_credits(micro)
