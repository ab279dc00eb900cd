"""`/v2/core/events`: the thin events of the past 30 days, with their data."""

from __future__ import annotations

from urllib.parse import urlencode

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.moments import parse_moment, rfc3339
from meterline.local.sandbox.state import JsonObject, State

__all__ = ["list_events", "retrieve_event"]

DAY_S = 86_400
KEPT_S = 30 * DAY_S
"""Events can be read for 30 days (API reference, v2 core events)."""
LIMIT_DEFAULT, LIMIT_MAX = 20, 100
TYPES_MAX = 20
"""Event types of one query (API reference, v2 core events, list)."""


def retrieve_event(state: State, params: Params, object_id: str, now: int) -> JsonObject:
    """`GET /v2/core/events/{id}`; raises StripeError 404, also for one that is too old."""
    params.finish()
    event = state.events.get(object_id)
    if event is None or event["created"] < rfc3339(now - KEPT_S):
        raise StripeError(404, f"No such event: {object_id}", code="not_found")
    return event


def list_events(state: State, params: Params, _object_id: str, now: int) -> JsonObject:
    """`GET /v2/core/events`, newest first, by `object_id`, `types` and `created`.

    Raises:
        StripeError: 400 for a filter or page that is none.
    """
    limit = params.integer("limit") or LIMIT_DEFAULT
    if not 1 <= limit <= LIMIT_MAX:
        raise StripeError(400, f"Invalid limit: must be between 1 and {LIMIT_MAX}", param="limit")
    object_id = params.text("object_id")
    types = params.text_list("types")
    if len(types) > TYPES_MAX:
        raise StripeError(400, f"At most {TYPES_MAX} types.", param="types")
    bounds = params.nested("created")
    created = {name: _bound(bounds, name) for name in ("gt", "gte", "lt", "lte")}
    bounds.finish()
    page = params.text("page")
    params.finish()
    found = [
        event
        for event in reversed(state.events.values())
        if event["created"] >= rfc3339(now - KEPT_S)
        and object_id in (None, event.get("related_object", {}).get("id"))
        and (not types or event["type"] in types)
        and _inside(event["created"], created)
    ]
    start = _after(found, page) if page else 0
    shown = found[start : start + limit]
    following = None
    if start + limit < len(found):
        query = {"limit": str(limit), "page": shown[-1]["id"]}
        query |= {} if object_id is None else {"object_id": object_id}
        query |= {f"types[{number}]": name for number, name in enumerate(types)}
        query |= {f"created[{name}]": bound for name, bound in created.items() if bound is not None}
        following = f"/v2/core/events?{urlencode(query)}"
    return {"data": shown, "next_page_url": following, "previous_page_url": None}


def _bound(bounds: Params, name: str) -> str | None:
    text = bounds.text(name)
    return None if text is None else rfc3339(int(parse_moment(text)))


def _inside(created: str, bounds: dict[str, str | None]) -> bool:
    """Texts of one form are in the order of their times."""
    above, first, below, last = (bounds[name] for name in ("gt", "gte", "lt", "lte"))
    return not (
        (above is not None and created <= above)
        or (first is not None and created < first)
        or (below is not None and created >= below)
        or (last is not None and created > last)
    )


def _after(events: list[JsonObject], event_id: str) -> int:
    for position, event in enumerate(events):
        if event["id"] == event_id:
            return position + 1
    raise StripeError(400, "Invalid page", param="page")
