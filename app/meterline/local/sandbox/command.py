"""The port between the HTTP layer and a resource: what a write is, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from meterline.local.sandbox.state import Change, JsonObject, State

__all__ = ["Call", "Command", "Outcome"]


@dataclass(frozen=True, slots=True)
class Call:
    """What a write may know besides its parameters.

    Attributes:
        now: Unix seconds.
        token: random, unlike any other call's; ids are made of it.
        idempotency_key: "" where the request has none.
        reject_as: a code a meter event shall be rejected with after its 200; "": none.
    """

    now: int
    token: str
    idempotency_key: str
    reject_as: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a write answers with 200 and what it changes; the changes are one record of the journal."""

    body: JsonObject
    changes: tuple[Change, ...]


class Command(Protocol):
    """A write whose parameters are known to be well-formed."""

    def lock(self, state: State) -> str | None:
        """Name of what this write needs for itself; while another holds it the answer is 429."""

    def execute(self, state: State, call: Call) -> Outcome:
        """Decide, changing nothing: the caller journals the changes and applies them.

        Raises:
            StripeError: refused; the idempotency layer stores refusals from here.
        """
