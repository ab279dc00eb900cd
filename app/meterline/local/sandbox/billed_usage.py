"""What an invoice line bills: the meter events of a service period that Stripe had when the line was counted.

Shares no code with the summaries, on purpose: a reader that compares the two compares two computations.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction

from meterline.local.sandbox.state import JsonObject, MeterEvent, State

__all__ = ["amount_of", "billed_quantity"]

WINDOW_S = {"hour": 3_600, "day": 86_400}
QUANTITY_STEP = Decimal("1E-12")
"""A line's `quantity_decimal` has at most 12 decimal places (API reference, invoice line items)."""


def billed_quantity(
    state: State, meter_id: str, customer: str, *, start: int, end: int, received_before: int | None
) -> Decimal:
    """Units of a line: events with `start <= timestamp < end` that were received in time and not cancelled.

    Never below 0: a negative sum is invoiced as nothing.

    Args:
        received_before: Unix seconds; None counts all there are.
    """
    meter = state.meters[meter_id]
    counted: list[MeterEvent] = []
    for event in state.receipts.get((meter_id, customer), ()):
        in_time = received_before is None or event.received_at < received_before
        if in_time and start <= event.timestamp < end and event.number not in state.cancelled:
            counted.append(event)
    if meter["event_time_window"] is not None:
        counted = _last_received_of_each(WINDOW_S[meter["event_time_window"]], counted)
    units = max(Fraction(0), _total(meter, counted))
    with localcontext(prec=100):
        return (Decimal(units.numerator) / Decimal(units.denominator)).quantize(QUANTITY_STEP, ROUND_DOWN)


def amount_of(quantity: Decimal, price: JsonObject) -> int:
    """What a quantity costs, in whole cents, halves rounded up."""
    with localcontext(prec=100):
        cents = quantity * Decimal(price["unit_amount_decimal"])
        return int(cents.quantize(Decimal(1), ROUND_HALF_UP))


def _last_received_of_each(window_s: int, events: Iterable[MeterEvent]) -> list[MeterEvent]:
    """Of a pre-aggregated meter only the event received last in each UTC hour or day counts."""
    return list({event.timestamp // window_s: event for event in events}.values())


def _total(meter: JsonObject, events: list[MeterEvent]) -> Fraction:
    formula = meter["default_aggregation"]["formula"]
    if formula == "count":
        return Fraction(len(events))
    if formula == "last":
        newest = max(events, key=lambda event: (event.timestamp, event.number), default=None)
        return Fraction(newest.value or 0) if newest else Fraction(0)
    return sum((Fraction(event.value or 0) for event in events), Fraction(0))
