"""Credits are integers: 1 credit = 1,000,000 micro-credits. Floats never touch money."""

from __future__ import annotations

from decimal import Context, Decimal, Inexact, InvalidOperation

__all__ = ["CREDITS_MICRO_MAX", "MICRO", "format_credits", "to_micro"]

MICRO = 1_000_000

CREDITS_MICRO_MAX = 10**15
"""Largest amount of one event, a billion credits: sums of thousands of such events still fit an int64."""

_MICRO_CREDIT = Decimal("0.000001")
_NEVER_ROUND = Context(prec=28, traps=[Inexact])
"""28 digits hold every amount within the limit; what doesn't fit them raises."""


def to_micro(amount: Decimal | int | str) -> int:
    """Exact micro-credits of an amount of credits.

    Args:
        amount: credits, e.g. `Decimal("17.25")`, `3` or `"0.000001"`. Floats are refused: they are inexact.

    Raises:
        ValueError: not a finite number, or finer than a micro-credit, or beyond `CREDITS_MICRO_MAX`.
    """
    if isinstance(amount, bool) or not isinstance(amount, Decimal | int | str):
        raise ValueError(
            f"credits must be a Decimal, an int or a decimal string, not {type(amount).__name__}"
        )
    try:
        value = Decimal(amount)
    except InvalidOperation:
        raise ValueError(f"credits {amount!r} is not a decimal number") from None
    if not value.is_finite():
        raise ValueError(f"credits {amount!r} is not a finite number")
    # Not abs(): it rounds to the context's 28 digits, as all of Decimal's arithmetic does; comparing doesn't.
    if value.copy_abs() > CREDITS_MICRO_MAX // MICRO:
        raise ValueError(f"credits {amount} is more than {CREDITS_MICRO_MAX // MICRO} in one event")
    try:
        micro = value.quantize(_MICRO_CREDIT, context=_NEVER_ROUND)
    except Inexact:
        raise ValueError(f"credits {amount} is finer than a micro-credit (six decimal places)") from None
    return int(micro.scaleb(6, context=_NEVER_ROUND))


def format_credits(micro: int) -> str:
    """Credits as people write them, without trailing zeros: 17250000 -> `17.25`."""
    whole, part = divmod(abs(micro), MICRO)
    text = f"{whole}.{part:06d}".rstrip("0").rstrip(".")
    return f"-{text}" if micro < 0 else text
