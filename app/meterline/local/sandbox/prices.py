"""Products and prices, as far as a metered price needs them: per unit, recurring, on a meter."""

from __future__ import annotations

import re
from dataclasses import dataclass

from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import StripeError, found
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.metadata import take_metadata
from meterline.local.sandbox.meters import meter_named
from meterline.local.sandbox.pagination import PageQuery
from meterline.local.sandbox.periods import INTERVALS
from meterline.local.sandbox.state import Change, JsonObject, State

__all__ = [
    "CreatePrice",
    "CreateProduct",
    "list_prices",
    "list_products",
    "retrieve_price",
    "retrieve_product",
]

INTERVAL_COUNT_MAX = {"day": 1_095, "week": 156, "month": 36, "year": 3}
"""Three years (API reference, prices, recurring.interval_count)."""

_CURRENCY = re.compile(r"[a-z]{3}")
_UNIT_AMOUNT = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,12})?", re.ASCII)
"""Cents with up to 12 decimal places (API reference, prices, unit_amount_decimal)."""


@dataclass(frozen=True, slots=True)
class CreateProduct:
    """`POST /v1/products`."""

    name: str
    description: str | None
    metadata: dict[str, str]

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreateProduct:
        """Take the parameters; raises StripeError 400."""
        return cls(
            name=params.required_text("name", length_max=250),
            description=params.text("description"),
            metadata=take_metadata(params),
        )

    def lock(self, _state: State) -> None:
        """A new object is nobody else's."""

    def execute(self, _state: State, call: Call) -> Outcome:
        """Always accepted."""
        product = _product(call, self.name, self.description, self.metadata)
        return Outcome(product, ({"kind": "product", "object": product},))


@dataclass(frozen=True, slots=True)
class CreatePrice:
    """`POST /v1/prices`: what one unit of a meter costs, and how often it is invoiced.

    Only what usage needs is served: per unit, `usage_type=metered`, with a meter (required since API
    2025-03-31.basil). Tiers, licensed prices and one-time prices are refused.
    """

    currency: str
    product_id: str | None
    product_name: str | None
    unit_amount: str
    interval: str
    interval_count: int
    meter_id: str
    nickname: str | None
    metadata: dict[str, str]

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreatePrice:
        """Take the parameters; raises StripeError 400."""
        currency = params.required_text("currency").lower()
        if not _CURRENCY.fullmatch(currency):
            raise StripeError(400, f"Invalid currency: {currency}", param="currency")
        product_id = params.text("product")
        product_data = params.nested("product_data")
        product_name = product_data.text("name", length_max=250)
        product_data.finish()
        if (product_id is None) == (product_name is None):
            raise StripeError(400, "Send one of product and product_data[name].", param="product")
        recurring = params.nested("recurring")
        interval = recurring.choice("interval", INTERVALS) or recurring.required_text("interval")
        interval_count = recurring.integer("interval_count")
        count = 1 if interval_count is None else interval_count
        if not 1 <= count <= INTERVAL_COUNT_MAX[interval]:
            raise StripeError(
                400, "A price's interval is at most three years.", param="recurring[interval_count]"
            )
        usage_type = recurring.choice("usage_type", ("metered", "licensed"))
        meter_id = recurring.text("meter")
        if usage_type != "metered" or meter_id is None:
            raise StripeError(
                400,
                "The sandbox serves metered prices: send recurring[usage_type]=metered and recurring[meter].",
                param="recurring[meter]",
            )
        recurring.finish()
        params.choice("billing_scheme", ("per_unit",))
        return cls(
            currency=currency,
            product_id=product_id,
            product_name=product_name,
            unit_amount=_unit_amount(params),
            interval=interval,
            interval_count=count,
            meter_id=meter_id,
            nickname=params.text("nickname"),
            metadata=take_metadata(params),
        )

    def lock(self, _state: State) -> None:
        """A new object is nobody else's."""

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused for a product or meter nobody knows."""
        meter_named(state, self.meter_id, param="recurring[meter]")
        changes: list[Change] = []
        product_id = self.product_id
        if product_id is None:
            product = _product(call, self.product_name or "", None, {})
            product_id = product["id"]
            changes.append({"kind": "product", "object": product})
        else:
            found(state.products, "product", product_id, param="product")
        price: JsonObject = {
            "id": f"price_{call.token}",
            "object": "price",
            "active": True,
            "billing_scheme": "per_unit",
            "created": call.now,
            "currency": self.currency,
            "livemode": False,
            "lookup_key": None,
            "metadata": self.metadata,
            "nickname": self.nickname,
            "product": product_id,
            "recurring": {
                "interval": self.interval,
                "interval_count": self.interval_count,
                "meter": self.meter_id,
                "trial_period_days": None,
                "usage_type": "metered",
            },
            "tax_behavior": "unspecified",
            "tiers_mode": None,
            "transform_quantity": None,
            "type": "recurring",
            "unit_amount": int(self.unit_amount) if self.unit_amount.isdecimal() else None,
            "unit_amount_decimal": self.unit_amount,
        }
        changes.append({"kind": "price", "object": price})
        return Outcome(price, tuple(changes))


def retrieve_product(state: State, params: Params, object_id: str, _now: int) -> JsonObject:
    """`GET /v1/products/{id}`; raises StripeError 404."""
    params.finish()
    return found(state.products, "product", object_id)


def list_products(state: State, params: Params, _object_id: str, _now: int) -> JsonObject:
    """`GET /v1/products`."""
    query = PageQuery.parse(params)
    params.finish()
    return query.page("/v1/products", list(reversed(state.products.values())))


def retrieve_price(state: State, params: Params, object_id: str, _now: int) -> JsonObject:
    """`GET /v1/prices/{id}`; raises StripeError 404."""
    params.finish()
    return found(state.prices, "price", object_id)


def list_prices(state: State, params: Params, _object_id: str, _now: int) -> JsonObject:
    """`GET /v1/prices`, of one `product` if given."""
    query = PageQuery.parse(params)
    product = params.text("product")
    params.finish()
    newest_first = [price for price in reversed(state.prices.values()) if product in (None, price["product"])]
    return query.page("/v1/prices", newest_first)


def _unit_amount(params: Params) -> str:
    """Cents of one unit as plain decimal text; raises StripeError 400 unless one of two fields has it."""
    whole, exact = params.text("unit_amount"), params.text("unit_amount_decimal")
    if (whole is None) == (exact is None):
        raise StripeError(400, "Send one of unit_amount and unit_amount_decimal.", param="unit_amount")
    amount = whole or exact or ""
    if not _UNIT_AMOUNT.fullmatch(amount) or (whole is not None and not whole.isdecimal()):
        raise StripeError(400, f"Invalid amount: {amount}", param="unit_amount")
    return amount


def _product(call: Call, name: str, description: str | None, metadata: dict[str, str]) -> JsonObject:
    return {
        "id": f"prod_{call.token}",
        "object": "product",
        "active": True,
        "created": call.now,
        "default_price": None,
        "description": description,
        "images": [],
        "livemode": False,
        "marketing_features": [],
        "metadata": metadata,
        "name": name,
        "type": "service",
        "updated": call.now,
    }
