"""How many requests a second an account may make; off unless the rules say a number."""

from __future__ import annotations

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.state import State

__all__ = ["RateLimits"]

METER_EVENTS = ("/v1/billing/meter_events", "/v2/billing/meter_events")


class RateLimits:
    """Counts of the current second of the sandbox's time."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._second = 0
        self._requests = 0
        self._meter_events = 0

    def admit(self, path: str, now: int) -> None:
        """Count one request; raises StripeError 429 beyond a limit. Nothing of it is stored under its key."""
        rules = self._state.rules
        if now != self._second:
            self._second, self._requests, self._meter_events = now, 0, 0
        self._requests += 1
        if rules.rate_limit_per_s and self._requests > rules.rate_limit_per_s:
            raise self._too_many("global-rate")
        if path in METER_EVENTS:
            self._meter_events += 1
            limit = rules.meter_event_rate_limit_per_s
            if limit and self._meter_events > limit:
                raise self._too_many("endpoint-rate")

    def _too_many(self, reason: str) -> StripeError:
        shown = {"Stripe-Rate-Limited-Reason": reason} if self._state.rules.rate_limit_reason else {}
        return StripeError(429, "Too many requests. Slow down.", code="rate_limit", headers=shown)
