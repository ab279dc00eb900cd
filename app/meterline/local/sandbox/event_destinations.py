"""Event destinations: URLs that are told of events, thin or with a snapshot of their object.

A delivery is due when its event happens; `courier.py` makes it, and again after each failure, three times.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.metadata import take_metadata
from meterline.local.sandbox.moments import rfc3339
from meterline.local.sandbox.rejections import ERROR_REPORT, NO_METER_FOUND
from meterline.local.sandbox.state import Change, JsonObject, State

__all__ = [
    "INVOICE_CREATED",
    "INVOICE_FINALIZED",
    "CreateEventDestination",
    "list_event_destinations",
    "snapshot_event",
    "wanted",
]

INVOICE_CREATED, INVOICE_FINALIZED = "invoice.created", "invoice.finalized"
TYPES = {"thin": (ERROR_REPORT, NO_METER_FOUND), "snapshot": (INVOICE_CREATED, INVOICE_FINALIZED)}
"""What happens in the sandbox; other types are taken and never happen."""
SECRET = "webhook_endpoint.signing_secret"  # noqa: S105 - the name of a field
HIDDEN = {"signing_secret": None}


@dataclass(frozen=True, slots=True)
class CreateEventDestination:
    """`POST /v2/core/event_destinations` of type `webhook_endpoint`."""

    name: str
    description: str
    payload: str
    enabled_events: tuple[str, ...]
    url: str
    include: tuple[str, ...]
    metadata: dict[str, str]

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreateEventDestination:
        """Take the parameters; raises StripeError 400."""
        params.choice("type", ("webhook_endpoint",)) or params.required_text("type")
        payload = params.choice("event_payload", tuple(TYPES)) or params.required_text("event_payload")
        enabled_events = params.text_list("enabled_events")
        if not enabled_events:
            raise StripeError(400, "Missing required param: enabled_events.", param="enabled_events")
        endpoint = params.nested("webhook_endpoint")
        url = endpoint.required_text("url")
        endpoint.finish()
        if urlsplit(url).scheme not in {"http", "https"}:
            raise StripeError(400, f"Invalid URL: {url}", param="webhook_endpoint[url]")
        params.text("snapshot_api_version")
        return cls(
            name=params.required_text("name"),
            description=params.text("description") or "",
            payload=payload,
            enabled_events=tuple(enabled_events),
            url=url,
            include=tuple(params.text_list("include")),
            metadata=take_metadata(params),
        )

    def lock(self, _state: State) -> None:
        """A new object is nobody else's."""

    def execute(self, _state: State, call: Call) -> Outcome:
        """Always accepted. The secret is told once, to who asks for it with `include`."""
        secret = f"whsec_{secrets.token_hex(16)}"
        destination: JsonObject = {
            "id": f"ed_{call.token}",
            "object": "v2.core.event_destination",
            "created": rfc3339(call.now),
            "description": self.description,
            "enabled_events": list(self.enabled_events),
            "event_payload": self.payload,
            "livemode": False,
            "metadata": self.metadata,
            "name": self.name,
            "status": "enabled",
            "type": "webhook_endpoint",
            "updated": rfc3339(call.now),
            "webhook_endpoint": {"signing_secret": secret, "url": self.url},
        }
        shown = destination if SECRET in self.include else _without_secret(destination)
        return Outcome(shown, ({"kind": "event_destination", "object": destination},))


def list_event_destinations(state: State, params: Params, _object_id: str, _now: int) -> JsonObject:
    """`GET /v2/core/event_destinations`: all of them on one page."""
    params.text("include")
    params.finish()
    shown = [_without_secret(destination) for destination in reversed(state.event_destinations.values())]
    return {"data": shown, "next_page_url": None, "previous_page_url": None}


def wanted(state: State, event_type: str) -> bool:
    """Whether a destination wants to be told of it."""
    return any(event_type in one["enabled_events"] for one in state.event_destinations.values())


def snapshot_event(state: State, event_type: str, snapshot: JsonObject, now: int) -> tuple[Change, ...]:
    """The change that announces something with a snapshot of its object; none where nobody wants it."""
    if not wanted(state, event_type):
        return ()
    event: dict[str, Any] = {
        "id": f"evt_{event_type.replace('.', '_')}_{snapshot['id']}",
        "object": "event",
        "api_version": None,
        "created": now,
        "data": {"object": snapshot},
        "livemode": False,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": event_type,
    }
    return ({"kind": "snapshot_event", "object": event, "at": now},)


def _without_secret(destination: JsonObject) -> JsonObject:
    return destination | {"webhook_endpoint": destination["webhook_endpoint"] | HIDDEN}
