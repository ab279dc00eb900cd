"""Meter events: what Stripe refuses at once, what it takes and rejects later, and what counts.

A 200 means received. An event with a fault that the rules call asynchronous (the unknown customer, unless
told otherwise) is answered with 200, holds its identifier, counts nowhere, and is reported later.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal

from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.limits import (
    EVENT_NAME_LENGTH_MAX,
    IDENTIFIER_LENGTH_MAX,
    check_timestamp,
    parse_value,
    still_remembered,
)
from meterline.local.sandbox.state import JsonObject, State

__all__ = ["CreateMeterEvent"]


@dataclass(frozen=True, slots=True)
class CreateMeterEvent:
    """`POST /v1/billing/meter_events`."""

    event_name: str
    payload: dict[str, str]
    identifier: str | None
    timestamp: int | None

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreateMeterEvent:
        """Take the parameters; raises StripeError 400."""
        payload = params.text_map("payload")
        if not payload:
            raise StripeError(
                400, "Missing required param: payload.", code="parameter_missing", param="payload"
            )
        return cls(
            event_name=params.required_text("event_name", length_max=EVENT_NAME_LENGTH_MAX),
            payload=payload,
            identifier=params.text("identifier", length_max=IDENTIFIER_LENGTH_MAX),
            timestamp=params.integer("timestamp"),
        )

    def lock(self, state: State) -> str | None:
        """One concurrent call per customer and meter (docs.stripe.com/rate-limits, concurrency limiter)."""
        meter_id = state.active_meters.get(self.event_name)
        if meter_id is None:
            return None
        customer_key = state.meters[meter_id]["customer_mapping"]["event_payload_key"]
        return f"{meter_id} {self.payload.get(customer_key)}"

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused for its meter, payload, timestamp or identifier; otherwise received."""
        return self.receive(state, call, state.rules.async_codes)

    def receive(self, state: State, call: Call, found_afterwards: Collection[str]) -> Outcome:
        """Take it in, or raise StripeError 400; faults of some codes are found only afterwards."""
        identifier = self.identifier or call.token
        event: JsonObject = {
            "object": "billing.meter_event",
            "created": call.now,
            "event_name": self.event_name,
            "identifier": identifier,
            "livemode": False,
            "payload": self.payload,
            "timestamp": call.now if self.timestamp is None else self.timestamp,
        }
        try:
            change = self._counted(state, event, call)
        except StripeError as fault:
            if fault.report_code is None or fault.report_code not in {*found_afterwards, call.reject_as}:
                raise
            _check_unused(state, identifier, call.now)
            change = {
                "kind": "meter_event_rejected",
                "object": event,
                "meter": self._related_meter(state),
                "customer": "",
                "code": fault.report_code,
                "message": fault.message,
                "idempotency_key": call.idempotency_key,
            }
        return Outcome(event, (change,))

    def _counted(self, state: State, event: JsonObject, call: Call) -> JsonObject:
        """The change of an event without fault; raises StripeError for any other."""
        meter = self._active_meter(state)
        customer = self._payload(meter["customer_mapping"]["event_payload_key"], "no_customer_defined")
        value = self._value(meter)
        check_timestamp(event["timestamp"], call.now)
        _check_unused(state, event["identifier"], call.now)
        _check_customer(state, customer)
        if call.reject_as:
            raise StripeError(400, f"Rejected as {call.reject_as}.", report_code=call.reject_as)
        return {
            "kind": "meter_event",
            "object": event,
            "meter": meter["id"],
            "customer": customer,
            "value": str(value),
        }

    def _related_meter(self, state: State) -> str:
        """The meter a report is about, also an archived one; "" where there never was one."""
        named = (one["id"] for one in state.meters.values() if one["event_name"] == self.event_name)
        return state.active_meters.get(self.event_name) or next(named, "")

    def _active_meter(self, state: State) -> JsonObject:
        meter_id = state.active_meters.get(self.event_name)
        if meter_id is None:
            raise StripeError(
                400,
                f'No active meter found for event name "{self.event_name}"',
                param="event_name",
                report_code="archived_meter" if self._related_meter(state) else "no_meter",
            )
        return state.meters[meter_id]

    def _payload(self, key: str, absent: str) -> str:
        value = self.payload.get(key)
        if not value:
            raise StripeError(
                400,
                f"The meter event's payload must have the key {key}.",
                param="payload",
                report_code=f"meter_event_{absent}",
            )
        return value

    def _value(self, meter: JsonObject) -> Decimal:
        """A meter that counts events needs no value; any other does."""
        key = meter["value_settings"]["event_payload_key"]
        if meter["default_aggregation"]["formula"] == "count" and key not in self.payload:
            return Decimal(1)
        return parse_value(self._payload(key, "value_not_found"))


def _check_customer(state: State, customer: str) -> None:
    if customer not in state.customers:
        raise StripeError(
            400,
            f"No such customer: '{customer}'",
            param="payload",
            report_code="meter_event_customer_not_found",
        )


def _check_unused(state: State, identifier: str, now: int) -> None:
    """Refuse an identifier that was used in the past 24 hours, on whatever meter and for whatever customer.

    The scope is documented nowhere; the widest is the strictest. The text, the absent code and the header
    are as observed on real accounts, several times in 2026.
    """
    earlier = state.identifiers.get(identifier)
    if earlier is not None and still_remembered(earlier.received_at, now):
        raise StripeError(400, f"An event already exists with identifier {identifier}.", should_retry=False)
