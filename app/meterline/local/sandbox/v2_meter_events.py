"""Meter events of API v2: JSON, RFC 3339 times, coded refusals, positive integers only.

Its reference lists what is refused at once. Times and customers are not in it: they are found afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.limits import EVENT_NAME_LENGTH_MAX, IDENTIFIER_LENGTH_MAX
from meterline.local.sandbox.meter_events import CreateMeterEvent
from meterline.local.sandbox.moments import parse_moment, rfc3339
from meterline.local.sandbox.state import State

__all__ = ["CreateV2MeterEvent"]

CODES = {
    "archived_meter": "archived_meter",
    "meter_event_invalid_value": "payload_invalid_value",
    "meter_event_value_too_many_digits": "payload_invalid_value",
    "meter_event_no_customer_defined": "payload_no_customer_defined",
    "meter_event_value_not_found": "payload_no_value_defined",
    "no_meter": "no_meter",
}
"""What a report calls it -> what API v2 refuses it with."""
FOUND_AFTERWARDS = ("meter_event_customer_not_found", "timestamp_in_future", "timestamp_too_far_in_past")


@dataclass(frozen=True, slots=True)
class CreateV2MeterEvent:
    """`POST /v2/billing/meter_events`."""

    event: CreateMeterEvent

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreateV2MeterEvent:
        """Take the parameters; raises StripeError 400."""
        timestamp = params.text("timestamp")
        event = CreateMeterEvent(
            event_name=params.required_text("event_name", length_max=EVENT_NAME_LENGTH_MAX),
            payload=params.text_map("payload"),
            identifier=params.text("identifier", length_max=IDENTIFIER_LENGTH_MAX),
            timestamp=None if timestamp is None else int(parse_moment(timestamp)),
        )
        return cls(event)

    def lock(self, state: State) -> str | None:
        """As with v1, and in common with it."""
        return self.event.lock(state)

    def execute(self, state: State, call: Call) -> Outcome:
        """As v1 decides it, in the form of v2."""
        try:
            self._check_value(state)
            received = self.event.receive(state, call, {*state.rules.async_codes, *FOUND_AFTERWARDS})
        except StripeError as refused:
            code = CODES.get(refused.report_code or "", "duplicate_meter_event")
            raise StripeError(refused.status, refused.message, code=code) from None
        times = {name: rfc3339(received.body[name]) for name in ("created", "timestamp")}
        return Outcome(received.body | times | {"object": "v2.billing.meter_event"}, received.changes)

    def _check_value(self, state: State) -> None:
        meter_id = state.active_meters.get(self.event.event_name)
        if meter_id is None:
            return
        value = self.event.payload.get(state.meters[meter_id]["value_settings"]["event_payload_key"])
        if value and not (value.isascii() and value.isdecimal() and int(value) > 0):
            raise StripeError(
                400,
                "The value must be a positive integer.",
                report_code="meter_event_invalid_value",
            )
