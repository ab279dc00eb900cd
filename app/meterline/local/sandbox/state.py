"""What is true in the sandbox: a fold of the changes in its journal.

`State.take` is the only way anything changes, live and at a restart, so a restart can't come out different.
Changes are JSON objects told apart by `kind`; nothing in here reads a clock.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias

from meterline.errors import UserError
from meterline.local.sandbox.limits import KEY_REMEMBERED_S, V2_KEY_REMEMBERED_S, still_remembered
from meterline.local.sandbox.rules import Rules

__all__ = [
    "REPORT_WINDOW_S",
    "Change",
    "ClockSetting",
    "Delivery",
    "JsonObject",
    "MeterEvent",
    "State",
    "StoredAnswer",
]

REPORT_WINDOW_S = 10
"""Rejections of so long go together into one report (the samples in Stripe's reference cover 10 seconds)."""

JsonObject: TypeAlias = dict[str, Any]
Change: TypeAlias = JsonObject


@dataclass(frozen=True, slots=True)
class ClockSetting:
    """How the sandbox's time follows from the real one: ahead by `offset_s`, or standing at a moment."""

    offset_s: float = 0.0
    stands_at: float | None = None


@dataclass(frozen=True, slots=True)
class MeterEvent:
    """One meter event that was answered with 200.

    Attributes:
        number: numbers events in the order Stripe received them.
        received_at: Unix seconds.
        value: None for one that was rejected afterwards; it counts nowhere.
    """

    number: int
    meter: str
    customer: str
    timestamp: int
    received_at: int
    value: Decimal | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event that a destination has not confirmed yet, and when it is told of it next."""

    event: str
    destination: str
    attempts: int
    next_at: int


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
    products: dict[str, JsonObject] = field(default_factory=dict)
    prices: dict[str, JsonObject] = field(default_factory=dict)
    subscriptions: dict[str, JsonObject] = field(default_factory=dict)
    invoices: dict[str, JsonObject] = field(default_factory=dict)
    """A draft's lines hold no quantities: those are counted whenever somebody looks."""
    invoices_of: dict[str, list[str]] = field(default_factory=dict)
    """Customer id -> ids of its invoices."""
    active_meters: dict[str, str] = field(default_factory=dict)
    """Event name -> id of the one active meter that takes its events."""
    usage: dict[tuple[str, str], list[MeterEvent]] = field(default_factory=dict)
    """(meter id, customer id) -> its events by timestamp, those of one second as received. For summaries."""
    receipts: dict[tuple[str, str], list[MeterEvent]] = field(default_factory=dict)
    """(meter id, customer id) -> its events as received. For invoices."""
    price_changes: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Subscription item -> when its price changed, and the price it had before; oldest first."""
    cancelled: dict[int, int] = field(default_factory=dict)
    """Number of a meter event -> when it was cancelled."""
    identifiers: dict[str, MeterEvent] = field(default_factory=dict)
    """Identifier -> its meter event of the past 24 hours, oldest first."""
    answers: dict[str, StoredAnswer] = field(default_factory=dict)
    v2_answers: dict[str, StoredAnswer] = field(default_factory=dict)
    """Idempotency key -> its first result, oldest first; of API v1 and of v2."""
    events: dict[str, JsonObject] = field(default_factory=dict)
    """Thin events, with their data."""
    snapshot_events: dict[str, JsonObject] = field(default_factory=dict)
    """Events of API v1, with a snapshot of their object."""
    event_destinations: dict[str, JsonObject] = field(default_factory=dict)
    """With their signing secrets."""
    deliveries: dict[tuple[str, str], Delivery] = field(default_factory=dict)
    """(event id, destination id) -> its next delivery."""
    unreported: dict[tuple[str, int], list[Change]] = field(default_factory=dict)
    """(meter id, start of ten seconds) -> rejections that no event has told of yet."""
    async_rejections: list[Change] = field(default_factory=list)
    """Events answered with 200 and dropped afterwards; Stripe reports them by a later notification."""
    clock: ClockSetting = field(default_factory=ClockSetting)
    clock_was_set: bool = False
    """A clock that was set once is kept when the sandbox is started with another."""
    rules: Rules = field(default_factory=Rules)
    received: int = 0

    def _apply(self, change: Change) -> None:
        """Take in one change.

        Raises:
            UserError: a kind this version doesn't know.
        """
        match change["kind"]:
            case "meter_event":
                self._apply_meter_event(change)
            case "meter_event_rejected":
                self._apply_rejection(change)
            case "cancel":
                self.cancelled[change["number"]] = change["at"]
            case "answer":
                self._apply_answer(change)
            case "meter":
                self._apply_meter(change["object"])
            case "invoice":
                self._apply_invoice(change["object"])
            case "event" | "snapshot_event" | "reported" | "delivery":
                self._apply_notice(change)
            case "customer" | "product" | "price" | "subscription" | "event_destination" as noun:
                objects: dict[str, JsonObject] = getattr(self, f"{noun}s")
                objects[change["object"]["id"]] = change["object"]
            case "price_change":
                self.price_changes.setdefault(change["item"], []).append((change["at"], change["before"]))
            case "clock" | "rules":
                self._apply_setting(change)
            case unknown:
                raise UserError(
                    f"The sandbox's state holds a change of kind {unknown!r} that this version of Meterline "
                    "doesn't know. Use the version that wrote it, or another --state-dir."
                )

    def take(self, record: Mapping[str, Any]) -> None:
        """Take in one record of the journal: the changes of one write, which belong together."""
        for change in record["changes"]:
            self._apply(change)

    def forget(self, now: int) -> None:
        """Drop identifiers and keys that Stripe no longer promises to know."""
        while self.identifiers:
            identifier, event = next(iter(self.identifiers.items()))
            if still_remembered(event.received_at, now):
                break
            del self.identifiers[identifier]
        for answers, remembered_s in (
            (self.answers, KEY_REMEMBERED_S),
            (self.v2_answers, V2_KEY_REMEMBERED_S),
        ):
            while answers:
                key, answer = next(iter(answers.items()))
                if still_remembered(answer.stored_at, now, remembered_s):
                    break
                del answers[key]

    def _apply_notice(self, change: Change) -> None:
        if change["kind"] == "reported":
            del self.unreported[change["meter"], change["window"]]
        elif change["kind"] == "delivery":
            self._apply_delivery(change)
        else:
            self._apply_event(change["object"], change)

    def _apply_event(self, event: JsonObject, change: Change) -> None:
        events = self.events if change["kind"] == "event" else self.snapshot_events
        events[event["id"]] = event
        for destination_id, destination in self.event_destinations.items():
            if event["type"] in destination["enabled_events"]:
                delivery = Delivery(event["id"], destination_id, 0, change["at"])
                self.deliveries[event["id"], destination_id] = delivery

    def _apply_delivery(self, change: Change) -> None:
        place = (change["event"], change["destination"])
        if change["next_at"] is None:
            self.deliveries.pop(place, None)
        else:
            self.deliveries[place] = Delivery(*place, change["attempts"], change["next_at"])

    def _apply_setting(self, change: Change) -> None:
        if change["kind"] == "rules":
            self.rules = Rules.from_json(change["rules"])
            return
        self.clock_was_set = True
        self.clock = ClockSetting(change["offset_s"], change["stands_at"])

    def _apply_answer(self, change: Change) -> None:
        answers = self.v2_answers if change.get("v2") else self.answers
        answers.pop(change["key"], None)  # one that is used again starts anew, at the young end
        answers[change["key"]] = StoredAnswer(
            fingerprint=change["fingerprint"],
            status=change["status"],
            body=change["body"],
            should_retry=change["should_retry"],
            stored_at=change["at"],
        )

    def _apply_meter(self, meter: JsonObject) -> None:
        self.meters[meter["id"]] = meter
        if meter["status"] == "active":
            self.active_meters[meter["event_name"]] = meter["id"]
        elif self.active_meters.get(meter["event_name"]) == meter["id"]:
            del self.active_meters[meter["event_name"]]

    def _apply_invoice(self, invoice: JsonObject) -> None:
        if invoice["id"] not in self.invoices:
            self.invoices_of.setdefault(invoice["customer"], []).append(invoice["id"])
        self.invoices[invoice["id"]] = invoice

    def _apply_meter_event(self, change: Change) -> None:
        event = self._remember(change, Decimal(change["value"]))
        place = (event.meter, event.customer)
        self.receipts.setdefault(place, []).append(event)
        insort(self.usage.setdefault(place, []), event, key=lambda other: (other.timestamp, other.number))

    def _apply_rejection(self, change: Change) -> None:
        self._remember(change, None)
        self.async_rejections.append(change)
        window = change["object"]["created"] // REPORT_WINDOW_S * REPORT_WINDOW_S
        self.unreported.setdefault((change["meter"], window), []).append(change)

    def _remember(self, change: Change, value: Decimal | None) -> MeterEvent:
        sent = change["object"]
        self.received += 1
        event = MeterEvent(
            number=self.received,
            meter=change["meter"],
            customer=change.get("customer", ""),
            timestamp=sent["timestamp"],
            received_at=sent["created"],
            value=value,
        )
        # An identifier that is used again after 24 hours starts anew, at the young end.
        self.identifiers.pop(sent["identifier"], None)
        self.identifiers[sent["identifier"]] = event
        return event
