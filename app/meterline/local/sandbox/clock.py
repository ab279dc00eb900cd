"""The sandbox's own time: the real one, shifted, or standing still until it is moved. It never goes back.

Everything follows it: dates and timestamps in answers, what is too old, what is forgotten, when periods end
and invoices become final.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.moments import parse_moment, rfc3339, seconds
from meterline.local.sandbox.state import Change, JsonObject, State

__all__ = ["Clock"]

YEAR_MAX = 9_000
"""Dates end with the year 9999; periods and retries reach into the future of a clock."""


class Clock:
    """Unix seconds now, as the state's setting says.

    Args:
        real: the real Unix seconds.
    """

    def __init__(self, state: State, real: Callable[[], float]) -> None:
        self._state = state
        self._real = real

    def __call__(self) -> float:
        """Now."""
        setting = self._state.clock
        return self._real() + setting.offset_s if setting.stands_at is None else setting.stands_at

    def face(self) -> JsonObject:
        """What `GET /_sandbox/clock` answers."""
        now = self()
        stands = self._state.clock.stands_at is not None
        return {"now": int(now), "iso": rfc3339(int(now)), "stands": stands}

    def moved(self, wish: dict[str, Any]) -> Change:
        """The change for `{"set": moment}` or `{"advance_s": n}`, with `"stands": bool` or alone.

        Raises:
            StripeError: 400 for anything else, and for a time before now.
        """
        unknown = wish.keys() - {"set", "advance_s", "stands"}
        if unknown or not wish or {"set", "advance_s"} <= wish.keys():
            raise StripeError(
                400, 'Send {"set": time} or {"advance_s": seconds}, and "stands": true or false.'
            )
        now = self()
        target = parse_moment(wish["set"]) if "set" in wish else now + seconds(wish.get("advance_s", 0))
        stands = wish.get("stands", self._state.clock.stands_at is not None)
        if not isinstance(stands, bool):
            raise StripeError(400, "stands is true or false.", param="stands")
        if target < now:
            raise StripeError(400, f"Time doesn't go back: it is {rfc3339(int(now))}.")
        if target >= datetime(YEAR_MAX, 1, 1, tzinfo=UTC).timestamp():
            raise StripeError(400, f"Time ends with the year {YEAR_MAX}.")
        return self.setting(target, stands=stands)

    def setting(self, moment: float, *, stands: bool) -> Change:
        """The change that makes it be `moment` now."""
        offset_s = 0.0 if stands else moment - self._real()
        return {"kind": "clock", "offset_s": offset_s, "stands_at": moment if stands else None}
