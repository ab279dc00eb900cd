"""Billing meters: create, rename, retrieve, list, deactivate, reactivate."""

from __future__ import annotations

from dataclasses import dataclass

from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import StripeError, found
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.limits import EVENT_NAME_LENGTH_MAX
from meterline.local.sandbox.pagination import PageQuery
from meterline.local.sandbox.state import JsonObject, State

__all__ = [
    "CreateMeter",
    "DeactivateMeter",
    "ReactivateMeter",
    "UpdateMeter",
    "find_meter",
    "list_meters",
    "meter_named",
    "retrieve_meter",
]

FORMULAS = ("sum", "count", "last")
TIME_WINDOWS = ("hour", "day")
"""Pre-aggregated meters: of the events of one UTC hour or day only the one received last counts."""
PAYLOAD_KEY_LENGTH_MAX = 100
DISPLAY_NAME_LENGTH_MAX = 250


@dataclass(frozen=True, slots=True)
class CreateMeter:
    """`POST /v1/billing/meters`."""

    display_name: str
    event_name: str
    formula: str
    customer_key: str
    value_key: str
    time_window: str | None

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreateMeter:
        """Take the parameters; raises StripeError 400."""
        display_name = params.required_text("display_name", length_max=DISPLAY_NAME_LENGTH_MAX)
        event_name = params.required_text("event_name", length_max=EVENT_NAME_LENGTH_MAX)
        aggregation = params.nested("default_aggregation")
        formula = aggregation.choice("formula", FORMULAS)
        if formula is None:
            aggregation.required_text("formula")  # refuses, with the parameter's name
        aggregation.finish()
        mapping = params.nested("customer_mapping")
        mapping.choice("type", ("by_id",))
        customer_key = mapping.text("event_payload_key", length_max=PAYLOAD_KEY_LENGTH_MAX)
        mapping.finish()
        value_settings = params.nested("value_settings")
        value_key = value_settings.text("event_payload_key", length_max=PAYLOAD_KEY_LENGTH_MAX)
        value_settings.finish()
        return cls(
            display_name=display_name,
            event_name=event_name,
            formula=formula or "",
            customer_key=customer_key or "stripe_customer_id",
            value_key=value_key or "value",
            time_window=params.choice("event_time_window", TIME_WINDOWS),
        )

    def lock(self, _state: State) -> None:
        """A new object is nobody else's."""

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused while an active meter has the event name: events must have one meter to go to."""
        _check_name_free(state, self.event_name)
        meter: JsonObject = {
            "id": f"mtr_{call.token}",
            "object": "billing.meter",
            "created": call.now,
            "customer_mapping": {"event_payload_key": self.customer_key, "type": "by_id"},
            "default_aggregation": {"formula": self.formula},
            "display_name": self.display_name,
            "event_name": self.event_name,
            "event_time_window": self.time_window,
            "livemode": False,
            "status": "active",
            "status_transitions": {"deactivated_at": None},
            "updated": call.now,
            "value_settings": {"event_payload_key": self.value_key},
        }
        return Outcome(meter, ({"kind": "meter", "object": meter},))


@dataclass(frozen=True, slots=True)
class UpdateMeter:
    """`POST /v1/billing/meters/{id}`: another display name. Nothing else of a meter ever changes."""

    meter_id: str
    display_name: str

    @classmethod
    def parse(cls, params: Params, object_id: str) -> UpdateMeter:
        """Take the parameter; raises StripeError 400, also for any other."""
        return cls(object_id, params.required_text("display_name", length_max=DISPLAY_NAME_LENGTH_MAX))

    def lock(self, _state: State) -> str:
        """One change of a meter at a time."""
        return self.meter_id

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused for a meter nobody knows."""
        meter = find_meter(state, self.meter_id)
        changed = {**meter, "display_name": self.display_name, "updated": call.now}
        return Outcome(changed, ({"kind": "meter", "object": changed},))


@dataclass(frozen=True, slots=True)
class DeactivateMeter:
    """`POST /v1/billing/meters/{id}/deactivate`: from now on it takes no events."""

    meter_id: str

    @classmethod
    def parse(cls, _params: Params, object_id: str) -> DeactivateMeter:
        """There are no parameters."""
        return cls(object_id)

    def lock(self, _state: State) -> str:
        """One change of a meter at a time."""
        return self.meter_id

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused for a meter that is unknown or inactive."""
        meter = find_meter(state, self.meter_id)
        if meter["status"] != "active":
            raise StripeError(400, f"The meter {self.meter_id} is already inactive.")
        return _with_status(meter, "inactive", deactivated_at=call.now, now=call.now)


@dataclass(frozen=True, slots=True)
class ReactivateMeter:
    """`POST /v1/billing/meters/{id}/reactivate`: it takes events again."""

    meter_id: str

    @classmethod
    def parse(cls, _params: Params, object_id: str) -> ReactivateMeter:
        """There are no parameters."""
        return cls(object_id)

    def lock(self, _state: State) -> str:
        """One change of a meter at a time."""
        return self.meter_id

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused for a meter that is unknown or active, or whose event name another one has by now."""
        meter = find_meter(state, self.meter_id)
        if meter["status"] == "active":
            raise StripeError(400, f"The meter {self.meter_id} is already active.")
        _check_name_free(state, meter["event_name"])
        return _with_status(meter, "active", deactivated_at=None, now=call.now)


def find_meter(state: State, meter_id: str) -> JsonObject:
    """The meter of an id that stands in the path; raises StripeError 404."""
    return meter_named(state, meter_id, param="id")


def meter_named(state: State, meter_id: str, *, param: str) -> JsonObject:
    """The meter a parameter names; raises StripeError 400, or 404 where it is the path's `id`."""
    return found(state.meters, "meter", meter_id, param=param)


def retrieve_meter(state: State, params: Params, object_id: str, _now: int) -> JsonObject:
    """`GET /v1/billing/meters/{id}`."""
    params.finish()
    return find_meter(state, object_id)


def list_meters(state: State, params: Params, _object_id: str, _now: int) -> JsonObject:
    """`GET /v1/billing/meters`, of one `status` if given."""
    query = PageQuery.parse(params)
    status = params.choice("status", ("active", "inactive"))
    params.finish()
    newest_first = [meter for meter in reversed(state.meters.values()) if status in (None, meter["status"])]
    return query.page("/v1/billing/meters", newest_first)


def _check_name_free(state: State, event_name: str) -> None:
    if event_name in state.active_meters:
        raise StripeError(
            400, f"An active meter already exists with event name {event_name}.", param="event_name"
        )


def _with_status(meter: JsonObject, status: str, *, deactivated_at: int | None, now: int) -> Outcome:
    changed = {
        **meter,
        "status": status,
        "status_transitions": {"deactivated_at": deactivated_at},
        "updated": now,
    }
    return Outcome(changed, ({"kind": "meter", "object": changed},))
