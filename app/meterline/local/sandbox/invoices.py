"""Invoices of subscriptions: drafted when a period ends, final one grace period later, then fixed for ever.

    period ends -> draft (counted whenever somebody looks) -> grace -> final (counted once more, and kept)

An event is on the invoice of the period its timestamp lies in if Stripe received it before that invoice was
final. Received later, it is on no invoice at all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

from meterline.local.sandbox.billed_usage import amount_of, billed_quantity
from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import StripeError, found
from meterline.local.sandbox.event_destinations import (
    INVOICE_CREATED,
    INVOICE_FINALIZED,
    snapshot_event,
    wanted,
)
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.invoice_objects import invoice_object, line_object, lines_list
from meterline.local.sandbox.pagination import PageQuery, TimeFilter
from meterline.local.sandbox.rules import HOUR_S, INVOICE_GRACE_MAX_S
from meterline.local.sandbox.state import JsonObject, State

__all__ = [
    "FinalizeInvoice",
    "cycle_invoice",
    "final",
    "first_invoice",
    "list_invoice_lines",
    "list_invoices",
    "retrieve_invoice",
]

STATUSES = ("draft", "open", "paid", "uncollectible", "void")


def first_invoice(state: State, subscription: JsonObject, now: int) -> JsonObject:
    """The invoice a subscription begins with: nothing used yet, so nothing to pay, and final at once."""
    invoice = _draft(state, subscription, now, now, "subscription_create", finalizes_at=now)
    return final(state, invoice, now)


def cycle_invoice(state: State, subscription: JsonObject, start: int, end: int) -> JsonObject:
    """The draft of a period that has just ended; it becomes final by itself after the grace period."""
    grace_s = state.rules.invoice_grace_s
    if grace_s == HOUR_S and wanted(state, INVOICE_CREATED):
        # Without a finalization time of the account's own it waits for who wants to be told of it.
        grace_s = INVOICE_GRACE_MAX_S
    return _draft(state, subscription, start, end, "subscription_cycle", finalizes_at=end + grace_s)


def final(state: State, draft: JsonObject, now: int) -> JsonObject:
    """A draft's final form: quantities as of now, a number, and paid where there is nothing to pay."""
    counted = _counted(state, draft)
    nothing_due = counted["total"] == 0
    status = "paid" if nothing_due else "open"
    earlier = sum(
        state.invoices[other]["number"] is not None for other in state.invoices_of.get(draft["customer"], ())
    )
    prefix = hashlib.sha256(draft["customer"].encode()).hexdigest()[:8].upper()
    return counted | {
        "auto_advance": False,
        "automatically_finalizes_at": None,
        "effective_at": now,
        "ending_balance": 0,
        "number": f"{prefix}-{earlier + 1:04d}",
        "status": status,
        "status_transitions": counted["status_transitions"]
        | {"finalized_at": now, "paid_at": now if nothing_due else None},
    }


@dataclass(frozen=True, slots=True)
class FinalizeInvoice:
    """`POST /v1/invoices/{id}/finalize`: not to wait for the end of the grace period."""

    invoice_id: str

    @classmethod
    def parse(cls, params: Params, object_id: str) -> FinalizeInvoice:
        """`auto_advance` is read and means nothing here: the sandbox collects no money."""
        params.choice("auto_advance", ("true", "false"))
        return cls(object_id)

    def lock(self, _state: State) -> str:
        """One change of an invoice at a time."""
        return self.invoice_id

    def execute(self, state: State, call: Call) -> Outcome:
        """Refused unless it is a draft."""
        draft = found(state.invoices, "invoice", self.invoice_id)
        if draft["status"] != "draft":
            raise StripeError(
                400,
                "This invoice is already finalized, you can't re-finalize a non-draft invoice.",
                code="invoice_not_editable",
            )
        invoice = final(state, draft, call.now)
        told = snapshot_event(state, INVOICE_FINALIZED, invoice, call.now)
        return Outcome(invoice, ({"kind": "invoice", "object": invoice}, *told))


def retrieve_invoice(state: State, params: Params, object_id: str, _now: int) -> JsonObject:
    """`GET /v1/invoices/{id}`; raises StripeError 404."""
    params.finish()
    return _counted(state, found(state.invoices, "invoice", object_id))


def list_invoices(state: State, params: Params, _object_id: str, _now: int) -> JsonObject:
    """`GET /v1/invoices`, by `customer`, `subscription`, `status` and `created`; unknown ids find nothing."""
    query = PageQuery.parse(params)
    customer, subscription = params.text("customer"), params.text("subscription")
    status = params.choice("status", STATUSES)
    created = TimeFilter.parse(params, "created")
    params.finish()
    if subscription is not None and customer is None:
        customer = state.subscriptions.get(subscription, {"customer": ""})["customer"]
    ids = state.invoices if customer is None else state.invoices_of.get(customer, [])
    newest_first = [
        invoice
        for invoice in (state.invoices[invoice_id] for invoice_id in reversed(ids))
        if subscription in (None, _subscription_of(invoice))
        and status in (None, invoice["status"])
        and created.takes(invoice["created"])
    ]
    page = query.page("/v1/invoices", newest_first)
    return page | {"data": [_counted(state, invoice) for invoice in page["data"]]}


def list_invoice_lines(state: State, params: Params, object_id: str, _now: int) -> JsonObject:
    """`GET /v1/invoices/{id}/lines`; raises StripeError 404."""
    query = PageQuery.parse(params)
    params.finish()
    lines = _counted(state, found(state.invoices, "invoice", object_id))["lines"]["data"]
    return query.page(f"/v1/invoices/{object_id}/lines", lines)


def _draft(
    state: State, subscription: JsonObject, start: int, end: int, reason: str, *, finalizes_at: int
) -> JsonObject:
    """A draft with a line for each item, and one more for each price it had in the period."""
    invoice_id = f"in_{_digest(subscription['id'], str(start), str(end))}"
    lines = [
        line_object(
            invoice_id,
            _digest(invoice_id, item["id"], str(first)),
            item,
            state.prices[price_id],
            start=first,
            end=last,
        )
        for item in subscription["items"]["data"]
        for price_id, first, last in _prices_in(state, item, start, end)
    ]
    customer = state.customers[subscription["customer"]]
    return invoice_object(
        invoice_id,
        subscription,
        customer,
        lines,
        created=end,
        period=(start, end),
        reason=reason,
        finalizes_at=finalizes_at,
    )


def _prices_in(state: State, item: JsonObject, start: int, end: int) -> list[tuple[str, int, int]]:
    """The prices of an item in a period, each with its part of it."""
    parts = []
    for changed_at, before in state.price_changes.get(item["id"], ()):
        if start < changed_at < end:
            parts.append((before, start, changed_at))
            start = changed_at
    return [*parts, (item["price"]["id"], start, end)]


def _counted(state: State, invoice: JsonObject) -> JsonObject:
    """The invoice with the quantities of this moment; one that is final is left as it is.

    A price that changes within a period leaves no grace: usage reported after the period ended is then on
    neither line (docs, invoice finalization grace period).
    """
    if invoice["status"] != "draft":
        return invoice
    lines = invoice["lines"]["data"]
    of_item = Counter(_item_of(line) for line in lines)
    counted = []
    for line in lines:
        price = state.prices[line["pricing"]["price_details"]["price"]]
        quantity = billed_quantity(
            state,
            price["recurring"]["meter"],
            invoice["customer"],
            start=line["period"]["start"],
            end=line["period"]["end"],
            received_before=invoice["created"] if of_item[_item_of(line)] > 1 else None,
        )
        amount = amount_of(quantity, price)
        counted.append(
            line
            | {
                "amount": amount,
                "quantity": int(quantity),
                "quantity_decimal": _plain(quantity),
                "subtotal": amount,
            }
        )
    total = sum(line["amount"] for line in counted)
    amounts = dict.fromkeys(
        (
            "amount_due",
            "amount_remaining",
            "subtotal",
            "subtotal_excluding_tax",
            "total",
            "total_excluding_tax",
        ),
        total,
    )
    return invoice | amounts | {"lines": lines_list(invoice["id"], counted)}


def _item_of(line: JsonObject) -> str:
    item: str = line["parent"]["subscription_item_details"]["subscription_item"]
    return item


def _subscription_of(invoice: JsonObject) -> str:
    subscription: str = invoice["parent"]["subscription_details"]["subscription"]
    return subscription


def _plain(quantity: Decimal) -> str:
    text = f"{quantity:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _digest(*parts: str) -> str:
    """Ids of objects that time makes follow from what they are made of: a restart makes the same ones."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
