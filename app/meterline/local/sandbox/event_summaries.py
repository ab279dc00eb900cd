"""Meter event summaries: what a customer's events on one meter add up to, over a time or by hour or day.

Exact inside (decimals whose sum may not round), a float on the wire because Stripe answers one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from decimal import Context, Decimal, Inexact, localcontext
from itertools import groupby

from meterline.local.sandbox.errors import StripeError, found
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.meters import find_meter
from meterline.local.sandbox.pagination import PageQuery
from meterline.local.sandbox.state import JsonObject, MeterEvent, State

__all__ = ["aggregate", "list_event_summaries"]

MINUTE_S = 60
GROUPING_S = {"hour": 3_600, "day": 86_400}

_EXACT = Context(prec=150, traps=[Inexact])
"""Values have at most 15 digits within 64 characters, so sums of 10^70 events still fit; rounding raises."""


def aggregate(formula: str, events: Sequence[MeterEvent]) -> Decimal:
    """The value of a meter over events in the order of their timestamps; at least one event."""
    if formula == "count":
        return Decimal(len(events))
    if formula == "last":
        return _value(events[-1])
    with localcontext(_EXACT):
        return sum(map(_value, events), Decimal(0))


def list_event_summaries(state: State, params: Params, meter_id: str, now: int) -> JsonObject:
    """`GET /v1/billing/meters/{id}/event_summaries`: what has arrived in them by now.

    `start_time` is inside and `end_time` outside; Stripe's texts disagree on the latter and recommend
    nothing, so a sender keeps its timestamps off the edges. Buckets without events are left out, and one
    without grouping too: whether Stripe sends zeros is documented nowhere.

    Raises:
        StripeError: 404 unknown meter; 400 unknown customer, unaligned or empty time range.
    """
    query = PageQuery.parse(params)
    customer = params.required_text("customer")
    start = params.required_integer("start_time")
    end = params.required_integer("end_time")
    grouping = params.choice("value_grouping_window", tuple(GROUPING_S))
    params.finish()
    meter = find_meter(state, meter_id)
    found(state.customers, "customer", customer, param="customer")
    _check_range(start, end, grouping)
    events = state.usage.get((meter_id, customer), [])
    seen_until = now - state.rules.summary_lag_s
    within = [
        event
        for event in events[_first_at(events, start) : _first_at(events, end)]
        if event.received_at <= seen_until
        and not state.cancelled.get(event.number, seen_until + 1) <= seen_until
    ]
    if grouping is None:
        buckets = [(start, end, within)] if within else []
    else:
        length = GROUPING_S[grouping]
        buckets = [
            (bucket, bucket + length, list(group))
            for bucket, group in groupby(within, key=lambda event: event.timestamp // length * length)
        ]
    if window := meter["event_time_window"]:
        buckets = [(first, last, _overwritten(group, GROUPING_S[window])) for first, last, group in buckets]
    formula = meter["default_aggregation"]["formula"]
    summaries = [
        {
            "id": f"mtrusg_{meter_id.removeprefix('mtr_')}_{customer}_{bucket_start}_{bucket_end}",
            "object": "billing.meter_event_summary",
            "aggregated_value": float(aggregate(formula, group)),
            "end_time": bucket_end,
            "livemode": False,
            "meter": meter_id,
            "start_time": bucket_start,
        }
        for bucket_start, bucket_end, group in reversed(buckets)
    ]
    return query.page(f"/v1/billing/meters/{meter_id}/event_summaries", summaries)


def _check_range(start: int, end: int, grouping: str | None) -> None:
    unit = GROUPING_S[grouping] if grouping else MINUTE_S
    for name, time in (("start_time", start), ("end_time", end)):
        if time % unit:
            raise StripeError(
                400, f"{name} must be aligned with {grouping or 'minute'} boundaries.", param=name
            )
    if start >= end:
        raise StripeError(400, "start_time must be before end_time.", param="start_time")


def _overwritten(events: Sequence[MeterEvent], window_s: int) -> list[MeterEvent]:
    """A pre-aggregated meter's events without those that a later receipt in their window replaced."""
    kept: dict[int, MeterEvent] = {}
    for event in events:
        window = event.timestamp // window_s
        if window not in kept or kept[window].number < event.number:
            kept[window] = event
    return list(kept.values())


def _first_at(events: Sequence[MeterEvent], timestamp: int) -> int:
    return bisect_left(events, timestamp, key=lambda event: event.timestamp)


def _value(event: MeterEvent) -> Decimal:
    assert event.value is not None, "an event that was rejected afterwards is in no usage"
    return event.value
