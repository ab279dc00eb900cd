"""Credits survive being written and read."""

from __future__ import annotations

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.credits import CREDITS_MICRO_MAX, MICRO, format_credits, to_micro

AMOUNTS = st.integers(-CREDITS_MICRO_MAX, CREDITS_MICRO_MAX)


@given(AMOUNTS)
def test_written_credits_read_back_to_the_same_amount(micro):
    """Text is as exact as the integer."""
    assert micro == to_micro(format_credits(micro))


@given(AMOUNTS)
def test_the_text_is_the_number(micro):
    """What people read is micro-credits divided by a million, exactly."""
    assert Decimal(micro) / MICRO == Decimal(format_credits(micro))


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=8))
def test_a_decimal_is_taken_exactly_or_refused(amount):
    """There is no third way: nothing is rounded."""
    try:
        micro = to_micro(amount)
    except ValueError:
        assert amount * MICRO != (amount * MICRO).to_integral_value()
    else:
        assert Decimal(micro) == amount * MICRO
