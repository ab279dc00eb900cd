"""Subscriptions of metered prices, and what the end of a period does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import StripeError, found
from meterline.local.sandbox.event_destinations import INVOICE_CREATED, snapshot_event
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.invoices import cycle_invoice, first_invoice
from meterline.local.sandbox.metadata import take_metadata
from meterline.local.sandbox.pagination import PageQuery
from meterline.local.sandbox.periods import period_around
from meterline.local.sandbox.state import Change, JsonObject, State

__all__ = [
    "CreateSubscription",
    "UpdateSubscription",
    "end_period",
    "list_subscription_items",
    "list_subscriptions",
    "retrieve_subscription",
]

ITEMS_MAX = 20
"""Prices of one subscription (docs, subscriptions with multiple products)."""
COLLECTION_METHODS = ("charge_automatically", "send_invoice")
PRORATIONS = ("always_invoice", "create_prorations", "none")


@dataclass(frozen=True, slots=True)
class CreateSubscription:
    """`POST /v1/subscriptions`. Trials, backdating, thresholds, discounts and taxes are not served."""

    customer: str
    prices: tuple[str, ...]
    anchor: int | None
    collection_method: str
    days_until_due: int | None
    description: str | None
    metadata: dict[str, str]

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreateSubscription:
        """Take the parameters; raises StripeError 400."""
        prices = []
        for item in params.nested_list("items"):
            prices.append(item.required_text("price"))
            item.finish()
        if not 1 <= len(prices) <= ITEMS_MAX or len(set(prices)) < len(prices):
            raise StripeError(400, f"Send 1 to {ITEMS_MAX} different prices.", param="items")
        # Nothing is ever prorated: usage is paid afterwards.
        params.choice("proration_behavior", PRORATIONS)
        method = params.choice("collection_method", COLLECTION_METHODS)
        return cls(
            customer=params.required_text("customer"),
            prices=tuple(prices),
            anchor=params.integer("billing_cycle_anchor"),
            collection_method=method or "charge_automatically",
            days_until_due=params.integer("days_until_due"),
            description=params.text("description", length_max=500),
            metadata=take_metadata(params),
        )

    def lock(self, _state: State) -> None:
        """A new object is nobody else's."""

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused for unknown ids, prices that don't go together, and an anchor in the past."""
        found(state.customers, "customer", self.customer, param="customer")
        prices = [found(state.prices, "price", price_id, param="items") for price_id in self.prices]
        _check_together(prices)
        interval = _interval(prices[0])
        anchor = call.now if self.anchor is None else self.anchor
        _, first_end = period_around(call.now, *interval, call.now)
        if not call.now <= anchor <= first_end:
            raise StripeError(
                400,
                "billing_cycle_anchor must be now or later, and no later than the end of one full period.",
                param="billing_cycle_anchor",
            )
        _, end = period_around(anchor, *interval, call.now)
        _check_grace(state, period_around(anchor, *interval, end))
        subscription = self._object(call, prices, anchor=anchor, end=end)
        invoice = first_invoice(state, subscription, call.now)
        subscription["latest_invoice"] = invoice["id"]
        return Outcome(
            subscription,
            ({"kind": "subscription", "object": subscription}, {"kind": "invoice", "object": invoice}),
        )

    def _object(self, call: Call, prices: Sequence[JsonObject], *, anchor: int, end: int) -> JsonObject:
        subscription_id = f"sub_{call.token}"
        items: list[JsonObject] = [
            {
                "id": f"si_{call.token}{number:02d}",
                "object": "subscription_item",
                "billing_thresholds": None,
                "created": call.now,
                "current_period_end": end,
                "current_period_start": call.now,
                "discounts": [],
                "metadata": {},
                "price": price,
                "subscription": subscription_id,
                "tax_rates": [],
            }
            for number, price in enumerate(prices)
        ]
        return {
            "id": subscription_id,
            "object": "subscription",
            "automatic_tax": {"disabled_reason": None, "enabled": False, "liability": None},
            "billing_cycle_anchor": anchor,
            "billing_cycle_anchor_config": None,
            "billing_mode": {"flexible": None, "type": "flexible"},
            "billing_thresholds": None,
            "cancel_at": None,
            "cancel_at_period_end": False,
            "canceled_at": None,
            "collection_method": self.collection_method,
            "created": call.now,
            "currency": prices[0]["currency"],
            "customer": self.customer,
            "days_until_due": self.days_until_due,
            "default_payment_method": None,
            "default_tax_rates": [],
            "description": self.description,
            "discounts": [],
            "ended_at": None,
            "items": _items_list(subscription_id, items),
            "latest_invoice": None,
            "livemode": False,
            "metadata": self.metadata,
            "pause_collection": None,
            "schedule": None,
            "start_date": call.now,
            "status": "active",
            "test_clock": None,
            "trial_end": None,
            "trial_start": None,
        }


@dataclass(frozen=True, slots=True)
class UpdateSubscription:
    """`POST /v1/subscriptions/{id}`: another price for an item, or other metadata."""

    subscription_id: str
    prices: tuple[tuple[str, str], ...]
    metadata: dict[str, str]

    @classmethod
    def parse(cls, params: Params, object_id: str) -> UpdateSubscription:
        """Take the parameters; raises StripeError 400."""
        prices = []
        for item in params.nested_list("items"):
            prices.append((item.required_text("id"), item.required_text("price")))
            item.finish()
        params.choice("proration_behavior", PRORATIONS)
        return cls(object_id, tuple(prices), take_metadata(params))

    def lock(self, _state: State) -> str:
        """One change of a subscription at a time."""
        return self.subscription_id

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused for unknown ids and prices that don't go together."""
        before = found(state.subscriptions, "subscription", self.subscription_id)
        items = {item["id"]: item for item in before["items"]["data"]}
        changes: list[Change] = []
        for item_id, price_id in self.prices:
            old = found(items, "subscription_item", item_id, param="items")["price"]
            price = found(state.prices, "price", price_id, param="items")
            if price["id"] != old["id"]:
                changes.append({"kind": "price_change", "item": item_id, "at": call.now, "before": old["id"]})
            items[item_id] = items[item_id] | {"price": price}
        _check_together([item["price"] for item in items.values()], like=before["items"]["data"][0]["price"])
        subscription = before | {
            "items": _items_list(before["id"], list(items.values())),
            "metadata": before["metadata"] | self.metadata,
        }
        return Outcome(subscription, ({"kind": "subscription", "object": subscription}, *changes))


def end_period(state: State, subscription: JsonObject) -> tuple[Change, ...]:
    """What the end of its current period does: a draft of what was used, and the next period begins."""
    items = subscription["items"]["data"]
    start, end = items[0]["current_period_start"], items[0]["current_period_end"]
    _, next_end = period_around(subscription["billing_cycle_anchor"], *_interval(items[0]["price"]), end)
    invoice = cycle_invoice(state, subscription, start, end)
    moved = [item | {"current_period_start": end, "current_period_end": next_end} for item in items]
    subscription = subscription | {
        "items": _items_list(subscription["id"], moved),
        "latest_invoice": invoice["id"],
    }
    return (
        {"kind": "invoice", "object": invoice},
        {"kind": "subscription", "object": subscription},
        *snapshot_event(state, INVOICE_CREATED, invoice, end),
    )


def retrieve_subscription(state: State, params: Params, object_id: str, _now: int) -> JsonObject:
    """`GET /v1/subscriptions/{id}`; raises StripeError 404."""
    params.finish()
    return found(state.subscriptions, "subscription", object_id)


def list_subscriptions(state: State, params: Params, _object_id: str, _now: int) -> JsonObject:
    """`GET /v1/subscriptions`, by `customer`, `price` and `status`."""
    query = PageQuery.parse(params)
    customer, price = params.text("customer"), params.text("price")
    params.choice("status", ("active", "all"))  # there are no others
    params.finish()
    newest_first = [
        subscription
        for subscription in reversed(state.subscriptions.values())
        if customer in (None, subscription["customer"])
        and (price is None or any(price == item["price"]["id"] for item in subscription["items"]["data"]))
    ]
    return query.page("/v1/subscriptions", newest_first)


def list_subscription_items(state: State, params: Params, _object_id: str, _now: int) -> JsonObject:
    """`GET /v1/subscription_items` of one `subscription`; raises StripeError 400 for an unknown one."""
    query = PageQuery.parse(params)
    subscription_id = params.required_text("subscription")
    params.finish()
    subscription = found(state.subscriptions, "subscription", subscription_id, param="subscription")
    return query.page("/v1/subscription_items", subscription["items"]["data"])


def _items_list(subscription_id: str, items: Sequence[JsonObject]) -> JsonObject:
    return {
        "object": "list",
        "data": list(items),
        "has_more": False,
        "total_count": len(items),
        "url": f"/v1/subscription_items?subscription={subscription_id}",
    }


def _interval(price: JsonObject) -> tuple[str, int]:
    return price["recurring"]["interval"], price["recurring"]["interval_count"]


def _check_together(prices: Sequence[JsonObject], like: JsonObject | None = None) -> None:
    """All items of a subscription share currency and interval, so that its periods are one."""
    first = like or prices[0]
    for price in prices:
        if _interval(price) != _interval(first) or price["currency"] != first["currency"]:
            raise StripeError(
                400, "All prices of a subscription must have one currency and one interval.", param="items"
            )


def _check_grace(state: State, period: tuple[int, int]) -> None:
    if state.rules.invoice_grace_s >= period[1] - period[0]:
        raise StripeError(400, "The finalization grace period must be shorter than the service period.")
