"""What is true in the sandbox: a fold of the changes in its journal.

`State.take` is the only way anything changes, live and at a restart, so a restart can't come out different.
Changes are JSON objects told apart by `kind`; nothing in here reads a clock.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias

from meterline.errors import UserError
from meterline.local.sandbox.limits import still_remembered

__all__ = ["Change", "JsonObject", "State", "StoredAnswer", "Usage"]

JsonObject: TypeAlias = dict[str, Any]
Change: TypeAlias = JsonObject


@dataclass(frozen=True, slots=True)
class Usage:
    """One counted meter event. `received` numbers events in the order Stripe got them."""

    timestamp: int
    received: int
    value: Decimal


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """The first result of an idempotency key. `fingerprint` covers the endpoint and every parameter."""

    fingerprint: str
    status: int
    body: JsonObject
    should_retry: bool | None
    stored_at: int


@dataclass(slots=True)
class State:
    """Objects as Stripe shows them, by id, in order of creation."""

    customers: dict[str, JsonObject] = field(default_factory=dict)
    meters: dict[str, JsonObject] = field(default_factory=dict)
    active_meters: dict[str, str] = field(default_factory=dict)
    """Event name -> id of the one active meter that takes its events."""
    usage: dict[tuple[str, str], list[Usage]] = field(default_factory=dict)
    """(meter id, customer id) -> its events by timestamp, those of one second as received."""
    identifiers: dict[str, int] = field(default_factory=dict)
    """Identifier of a meter event -> when it was received, oldest first."""
    answers: dict[str, StoredAnswer] = field(default_factory=dict)
    """Idempotency key -> its first result, oldest first."""
    async_rejections: list[Change] = field(default_factory=list)
    """Events answered with 200 and dropped afterwards; Stripe reports them by a later notification."""
    received: int = 0

    def _apply(self, change: Change) -> None:
        """Take in one change.

        Raises:
            UserError: a kind this version doesn't know.
        """
        match change["kind"]:
            case "customer":
                self.customers[change["object"]["id"]] = change["object"]
            case "meter":
                self._apply_meter(change["object"])
            case "meter_event":
                self._apply_meter_event(change)
            case "meter_event_rejected":
                self._remember(change["object"])
                self.async_rejections.append(change)
            case "answer":
                self.answers[change["key"]] = StoredAnswer(
                    fingerprint=change["fingerprint"],
                    status=change["status"],
                    body=change["body"],
                    should_retry=change["should_retry"],
                    stored_at=change["at"],
                )
            case unknown:
                raise UserError(
                    f"The sandbox's state holds a change of kind {unknown!r} that this version of Meterline "
                    "doesn't know. Use the version that wrote it, or another --state-dir."
                )

    def take(self, record: JsonObject) -> None:
        """Take in one record of the journal: the changes of one write, which belong together."""
        for change in record["changes"]:
            self._apply(change)

    def forget(self, now: int) -> None:
        """Drop identifiers and keys that Stripe no longer promises to know."""
        while self.identifiers:
            identifier, received_at = next(iter(self.identifiers.items()))
            if still_remembered(received_at, now):
                break
            del self.identifiers[identifier]
        while self.answers:
            key, answer = next(iter(self.answers.items()))
            if still_remembered(answer.stored_at, now):
                break
            del self.answers[key]

    def _apply_meter(self, meter: JsonObject) -> None:
        self.meters[meter["id"]] = meter
        if meter["status"] == "active":
            self.active_meters[meter["event_name"]] = meter["id"]
        elif self.active_meters.get(meter["event_name"]) == meter["id"]:
            del self.active_meters[meter["event_name"]]

    def _apply_meter_event(self, change: Change) -> None:
        self._remember(change["object"])
        usage = Usage(change["object"]["timestamp"], self.received, Decimal(change["value"]))
        insort(
            self.usage.setdefault((change["meter"], change["customer"]), []),
            usage,
            key=lambda event: (event.timestamp, event.received),
        )

    def _remember(self, event: JsonObject) -> None:
        self.received += 1
        # An identifier that is used again after 24 hours starts anew, at the young end.
        self.identifiers.pop(event["identifier"], None)
        self.identifiers[event["identifier"]] = event["created"]
