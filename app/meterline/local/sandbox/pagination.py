"""Stripe's list answers: newest first, cursors that are object ids, at most 100 objects a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.state import JsonObject

__all__ = ["PageQuery"]

LIMIT_DEFAULT = 10
LIMIT_MAX = 100
"""Objects of one page (Stripe's API reference, pagination)."""


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which page is asked for."""

    limit: int
    starting_after: str | None
    ending_before: str | None

    @classmethod
    def parse(cls, params: Params) -> PageQuery:
        """Take the paging parameters.

        Raises:
            StripeError: 400 for a limit out of range, or both cursors at once.
        """
        limit = params.integer("limit")
        if limit is None:
            limit = LIMIT_DEFAULT
        if not 1 <= limit <= LIMIT_MAX:
            raise StripeError(400, f"Invalid limit: must be between 1 and {LIMIT_MAX}", param="limit")
        query = cls(limit, params.text("starting_after"), params.text("ending_before"))
        if query.starting_after is not None and query.ending_before is not None:
            raise StripeError(400, "Use starting_after or ending_before, not both.", param="ending_before")
        return query

    def page(self, url: str, objects: Sequence[JsonObject]) -> JsonObject:
        """The list answer for `objects`, which are all there are, newest first.

        Raises:
            StripeError: 400 for a cursor that is none of them.
        """
        start, end = 0, len(objects)
        if self.ending_before is not None:
            end = _position(objects, self.ending_before, "ending_before")
            start = max(0, end - self.limit)
            has_more = start > 0
        else:
            if self.starting_after is not None:
                start = _position(objects, self.starting_after, "starting_after") + 1
            has_more = end - start > self.limit
            end = min(end, start + self.limit)
        return {"object": "list", "url": url, "has_more": has_more, "data": list(objects[start:end])}


def _position(objects: Sequence[JsonObject], object_id: str, param: str) -> int:
    for position, candidate in enumerate(objects):
        if candidate["id"] == object_id:
            return position
    raise StripeError.missing_object("object", object_id, param=param)
