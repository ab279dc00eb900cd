"""Every endpoint of Stripe's that the sandbox serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meterline.local.sandbox import (
    adjustments,
    core_events,
    customers,
    event_destinations,
    event_summaries,
    invoices,
    meter_events,
    meters,
    prices,
    subscriptions,
    v2_meter_events,
)
from meterline.local.sandbox.command import Command
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.state import JsonObject, State

__all__ = ["READS", "WRITES", "Read", "Write"]

Write = Callable[[Params, str], Command]
"""Parameters and the id in the path -> the command; raises StripeError 400."""
Read = Callable[[State, Params, str, int], JsonObject]
"""State, parameters, the id in the path, Unix seconds now -> the answer; raises StripeError."""

WRITES: Mapping[str, Write] = {
    "/v1/customers": customers.CreateCustomer.parse,
    "/v1/billing/meters": meters.CreateMeter.parse,
    "/v1/billing/meters/{id}": meters.UpdateMeter.parse,
    "/v1/billing/meters/{id}/deactivate": meters.DeactivateMeter.parse,
    "/v1/billing/meters/{id}/reactivate": meters.ReactivateMeter.parse,
    "/v1/billing/meter_events": meter_events.CreateMeterEvent.parse,
    "/v1/billing/meter_event_adjustments": adjustments.CreateMeterEventAdjustment.parse,
    "/v1/products": prices.CreateProduct.parse,
    "/v1/prices": prices.CreatePrice.parse,
    "/v1/subscriptions": subscriptions.CreateSubscription.parse,
    "/v1/subscriptions/{id}": subscriptions.UpdateSubscription.parse,
    "/v1/invoices/{id}/finalize": invoices.FinalizeInvoice.parse,
    "/v2/billing/meter_events": v2_meter_events.CreateV2MeterEvent.parse,
    "/v2/core/event_destinations": event_destinations.CreateEventDestination.parse,
}
READS: Mapping[str, Read] = {
    "/v1/customers": customers.list_customers,
    "/v1/customers/{id}": customers.retrieve_customer,
    "/v1/billing/meters": meters.list_meters,
    "/v1/billing/meters/{id}": meters.retrieve_meter,
    "/v1/billing/meters/{id}/event_summaries": event_summaries.list_event_summaries,
    "/v2/core/event_destinations": event_destinations.list_event_destinations,
    "/v2/core/events": core_events.list_events,
    "/v2/core/events/{id}": core_events.retrieve_event,
    "/v1/products": prices.list_products,
    "/v1/products/{id}": prices.retrieve_product,
    "/v1/prices": prices.list_prices,
    "/v1/prices/{id}": prices.retrieve_price,
    "/v1/subscriptions": subscriptions.list_subscriptions,
    "/v1/subscriptions/{id}": subscriptions.retrieve_subscription,
    "/v1/subscription_items": subscriptions.list_subscription_items,
    "/v1/invoices": invoices.list_invoices,
    "/v1/invoices/{id}": invoices.retrieve_invoice,
    "/v1/invoices/{id}/lines": invoices.list_invoice_lines,
}
