"""Meter event adjustments: an event that shouldn't have been sent is cancelled, within a day of its receipt.

It leaves the summaries and the drafts. An invoice that is final stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.limits import EVENT_NAME_LENGTH_MAX, IDENTIFIER_LENGTH_MAX, still_cancellable
from meterline.local.sandbox.state import JsonObject, State

__all__ = ["CreateMeterEventAdjustment"]


@dataclass(frozen=True, slots=True)
class CreateMeterEventAdjustment:
    """`POST /v1/billing/meter_event_adjustments`."""

    event_name: str
    identifier: str

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreateMeterEventAdjustment:
        """Take the parameters; a range of time can't be cancelled. Raises StripeError 400."""
        event_name = params.required_text("event_name", length_max=EVENT_NAME_LENGTH_MAX)
        params.choice("type", ("cancel",)) or params.required_text("type")
        cancel = params.nested("cancel")
        identifier = cancel.required_text("identifier", length_max=IDENTIFIER_LENGTH_MAX)
        cancel.finish()
        return cls(event_name, identifier)

    def lock(self, _state: State) -> str:
        """One adjustment of an event at a time."""
        return f"cancel {self.identifier}"

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused for an event nobody knows, one of another meter, an old one, and one cancelled before.

        The status is `pending` while summaries may still show the event. The identifier stays used: whether
        Stripe frees it is documented nowhere.
        """
        event = state.identifiers.get(self.identifier)
        if event is None or state.active_meters.get(self.event_name) != event.meter:
            raise StripeError(
                400,
                f"No meter event of {self.event_name} with identifier {self.identifier} was received in the "
                "past 24 hours.",
                param="cancel[identifier]",
            )
        if not still_cancellable(event.received_at, call.now):
            raise StripeError(
                400,
                "A meter event can be cancelled within 24 hours of its receipt.",
                param="cancel[identifier]",
            )
        if event.number in state.cancelled:
            raise StripeError(400, "This meter event is cancelled already.", param="cancel[identifier]")
        adjustment: JsonObject = {
            "object": "billing.meter_event_adjustment",
            "cancel": {"identifier": self.identifier},
            "event_name": self.event_name,
            "livemode": False,
            "status": "pending" if state.rules.summary_lag_s else "complete",
            "type": "cancel",
        }
        return Outcome(adjustment, ({"kind": "cancel", "number": event.number, "at": call.now},))
