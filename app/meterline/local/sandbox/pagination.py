"""Stripe's list answers: newest first, cursors that are object ids, at most 100 objects a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.state import JsonObject

__all__ = ["PageQuery", "TimeFilter"]

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


@dataclass(frozen=True, slots=True)
class TimeFilter:
    """A filter on a Unix timestamp: `created=5`, or `created[gt]`, `[gte]`, `[lt]`, `[lte]`."""

    first: int | None
    last: int | None

    @classmethod
    def parse(cls, params: Params, key: str) -> TimeFilter:
        """Take the parameter; raises StripeError 400."""
        if not params.is_map(key):
            exactly = params.integer(key)
            return cls(exactly, exactly)
        bounds = params.nested(key)
        above, first = bounds.integer("gt"), bounds.integer("gte")
        below, last = bounds.integer("lt"), bounds.integer("lte")
        bounds.finish()
        firsts = [bound for bound in (first, None if above is None else above + 1) if bound is not None]
        lasts = [bound for bound in (last, None if below is None else below - 1) if bound is not None]
        return cls(max(firsts, default=None), min(lasts, default=None))

    def takes(self, moment: int) -> bool:
        """Whether a timestamp is inside."""
        return (self.first is None or self.first <= moment) and (self.last is None or moment <= self.last)


def _position(objects: Sequence[JsonObject], object_id: str, param: str) -> int:
    for position, candidate in enumerate(objects):
        if candidate["id"] == object_id:
            return position
    raise StripeError.missing_object("object", object_id, param=param)
