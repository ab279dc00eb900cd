"""Scripted trouble: what a network, a proxy or Stripe itself does to a request now and then.

A fault is set with `POST /_sandbox/faults` and lives in memory: a restart ends it. Faults are looked at in
the order they were set, and the first that applies does; `GET /_sandbox/faults` says how often each one did.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.rules import ASYNC_CODES
from meterline.local.sandbox.state import JsonObject

__all__ = ["Action", "Fault", "Faults", "fault_refusal"]

FAULTS_MAX = 100
"""Far more than a script has; each one is looked at for each request."""
DELAY_S_MAX = 600.0


class Action(StrEnum):
    """What becomes of a request."""

    DROP_BEFORE = "drop_before_commit"
    """The connection breaks and nothing has happened."""
    DROP_AFTER = "drop_after_commit"
    """It has happened, and the connection breaks without an answer."""
    TRUNCATE = "truncate"
    """It has happened, and the answer breaks off in the middle of its body."""
    ERROR_BEFORE = "error_500_before_commit"
    ERROR_AFTER = "error_500_after_commit"
    """A 500, without and with its effect. Both are the key's first result."""
    SLOW = "slow"
    """The answer takes `delay_s` real seconds; key and locks are held meanwhile."""
    CONFLICT = "conflict_409"
    """Another call for the customer and meter, as it were; nothing has happened."""
    RATE_LIMIT = "rate_limit_429"
    LOCK_TIMEOUT = "lock_timeout_429"
    """Too many, with `reason` in the header; or a lock, without the header. Nothing has happened."""
    DOWN = "down"
    """As DROP_BEFORE, for `for_s` seconds of the sandbox's time."""
    REJECT = "reject_async"
    """A meter event that is accepted, and rejected afterwards with `code`."""


REASONS = ("global-rate", "global-concurrency", "endpoint-rate", "endpoint-concurrency", "resource-specific")


@dataclass(slots=True)
class Fault:
    """One fault.

    Attributes:
        action: what it does.
        path: regular expression; it applies where this is found in the path.
        method: only to this one; "": to all.
        skip: let so many pass that would match first.
        count: apply so often, then no more; None: without end.
        probability: to each that matches, drawn from `seed`.
        for_s: of the sandbox's time from when it was set; None: without end.
        delay_s, code, reason: of the actions that need them.
        applied: how often it was.
    """

    action: Action
    path: str = "/v1/billing/meter_events$"
    method: str = "POST"
    skip: int = 0
    count: int | None = None
    probability: float = 1.0
    seed: int = 0
    for_s: float | None = None
    delay_s: float = 1.0
    code: str = "meter_event_customer_not_found"
    reason: str = "global-rate"
    applied: int = 0
    set_at: int = 0
    _chance: random.Random = field(default_factory=random.Random, repr=False)

    @classmethod
    def parse(cls, wish: JsonObject, now: int) -> Fault:
        """Take one from JSON; raises StripeError 400 for what is none."""
        known = {one.name: one for one in fields(cls) if one.name not in {"applied", "set_at", "_chance"}}
        if unknown := wish.keys() - known.keys():
            raise StripeError(400, f"Received unknown parameter: {min(unknown)}")
        action = wish.get("action")
        if action not in tuple(Action):
            raise StripeError(400, f"action is one of {', '.join(Action)}.", param="action")
        for name, value in wish.items():
            if not _fits(name, value):
                raise StripeError(400, f"Not a value for {name}: {value!r}", param=name)
        fault = cls(**{**wish, "action": Action(action)}, set_at=now)
        fault._chance.seed(fault.seed)
        return fault

    def applies(self, method: str, path: str, now: int) -> bool:
        """Whether it hits this request; each request is asked about once."""
        if self.count is not None and self.applied >= self.count:
            return False
        if self.for_s is not None and now - self.set_at >= self.for_s:
            return False
        if self.method not in {"", method} or not re.search(self.path, path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self._chance.random() >= self.probability:
            return False
        self.applied += 1
        return True

    def face(self) -> JsonObject:
        """It as JSON, with how often it was applied."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "_chance"}


class Faults:
    """The faults that are set."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Set one more, after the others; raises StripeError 400 when there are too many."""
        if len(self._faults) >= FAULTS_MAX:
            raise StripeError(400, f"At most {FAULTS_MAX} faults. DELETE /_sandbox/faults forgets them.")
        self._faults.append(fault)

    def clear(self) -> None:
        """Forget them all."""
        self._faults.clear()

    def face(self) -> JsonObject:
        """All of them."""
        return {"data": [fault.face() for fault in self._faults]}

    def hit(self, method: str, path: str, now: int) -> Fault | None:
        """The fault that this request meets."""
        return next((fault for fault in self._faults if fault.applies(method, path, now)), None)


def fault_refusal(fault: Fault) -> StripeError | None:
    """The refusal of a fault that is one, before anything has happened; None: it is something else."""
    match fault.action:
        case Action.CONFLICT:
            return StripeError(
                409, "Another request for this customer and meter is running.", kind="api_error"
            )
        case Action.RATE_LIMIT:
            return StripeError(
                429,
                "Too many requests. Slow down.",
                code="rate_limit",
                headers={"Stripe-Rate-Limited-Reason": fault.reason},
            )
        case Action.LOCK_TIMEOUT:
            return StripeError(
                429, "Another request holds this object.", code="lock_timeout", should_retry=True
            )
    return None


def _fits(name: str, value: Any) -> bool:
    check = CHECKS.get(name)
    return isinstance(value, str) if check is None else check(value)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _within(largest: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and 0 <= value <= largest


CHECKS: dict[str, Callable[[Any], bool]] = {
    "count": _is_count,
    "skip": _is_count,
    "seed": _is_count,
    "probability": _within(1),
    "for_s": _within(math.inf),
    "delay_s": _within(DELAY_S_MAX),
    "code": lambda value: value in ASYNC_CODES,
    "reason": lambda value: value in REASONS,
    "path": lambda value: isinstance(value, str) and _compiles(value),
}
"""What the JSON of a fault may hold; where none is named, any text."""
