"""Invoices and their lines as API 2026-10-28 shows them; what the sandbox doesn't know is absent or null."""

from __future__ import annotations

from collections.abc import Sequence

from meterline.local.sandbox.state import JsonObject

__all__ = ["invoice_object", "line_object", "lines_list"]


def line_object(
    invoice_id: str, digest: str, item: JsonObject, price: JsonObject, *, start: int, end: int
) -> JsonObject:
    """A line of metered usage, not counted yet."""
    return {
        "id": f"il_{digest}",
        "object": "line_item",
        "amount": 0,
        "currency": price["currency"],
        "description": price["nickname"],
        "discount_amounts": [],
        "discountable": True,
        "discounts": [],
        "invoice": invoice_id,
        "livemode": False,
        "metadata": {},
        "parent": {
            "invoice_item_details": None,
            "subscription_item_details": {
                "invoice_item": None,
                "proration": False,
                "proration_details": {"credited_items": None},
                "subscription": item["subscription"],
                "subscription_item": item["id"],
            },
            "type": "subscription_item_details",
        },
        "period": {"end": end, "start": start},
        "pricing": {
            "price_details": {"price": price["id"], "product": price["product"]},
            "type": "price_details",
            "unit_amount_decimal": price["unit_amount_decimal"],
        },
        "quantity": 0,
        "quantity_decimal": "0",
        "subscription": item["subscription"],
        "subtotal": 0,
        "taxes": [],
    }


def invoice_object(
    invoice_id: str,
    subscription: JsonObject,
    customer: JsonObject,
    lines: Sequence[JsonObject],
    *,
    created: int,
    period: tuple[int, int],
    reason: str,
    finalizes_at: int,
) -> JsonObject:
    """A draft of a subscription."""
    return {
        "id": invoice_id,
        "object": "invoice",
        "amount_due": 0,
        "amount_overpaid": 0,
        "amount_paid": 0,
        "amount_remaining": 0,
        "amount_shipping": 0,
        "attempt_count": 0,
        "attempted": False,
        "auto_advance": True,
        "automatic_tax": {"enabled": False, "liability": None, "status": None},
        "automatically_finalizes_at": finalizes_at,
        "billing_reason": reason,
        "collection_method": subscription["collection_method"],
        "created": created,
        "currency": subscription["currency"],
        "customer": customer["id"],
        "customer_email": customer["email"],
        "customer_name": customer["name"],
        "customer_phone": customer["phone"],
        "default_tax_rates": [],
        "description": None,
        "discounts": [],
        "due_date": None,
        "effective_at": None,
        "ending_balance": None,
        "issuer": {"type": "self"},
        "lines": lines_list(invoice_id, lines),
        "livemode": False,
        "metadata": {},
        "next_payment_attempt": None,
        "number": None,
        "parent": {
            "quote_details": None,
            "subscription_details": {
                "metadata": subscription["metadata"],
                "subscription": subscription["id"],
            },
            "type": "subscription_details",
        },
        "period_end": period[1],
        "period_start": period[0],
        "post_payment_credit_notes_amount": 0,
        "pre_payment_credit_notes_amount": 0,
        "starting_balance": 0,
        "status": "draft",
        "status_transitions": {
            "finalized_at": None,
            "marked_uncollectible_at": None,
            "paid_at": None,
            "voided_at": None,
        },
        "subtotal": 0,
        "subtotal_excluding_tax": 0,
        "total": 0,
        "total_excluding_tax": 0,
        "total_taxes": [],
        "webhooks_delivered_at": None,
    }


def lines_list(invoice_id: str, lines: Sequence[JsonObject]) -> JsonObject:
    """The list inside an invoice: all lines, where Stripe shows the first ten of them."""
    return {
        "object": "list",
        "data": list(lines),
        "has_more": False,
        "total_count": len(lines),
        "url": f"/v1/invoices/{invoice_id}/lines",
    }
