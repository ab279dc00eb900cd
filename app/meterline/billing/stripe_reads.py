"""What Stripe tells back: summaries of a day, lines of an invoice, notices of rejections, subscriptions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import stripe

from meterline.billing.outcomes import ANSWERLESS, classify
from meterline.domain.accounts import AccountKey
from meterline.errors import RetryLater

__all__ = ["Invoice", "Notice", "Reads", "StripeReads"]

THREADS = 4
"""Stripe wants few reads, and in test mode they count like meter events: they never crowd out sending."""
MINUTE_MS = 60_000
INVOICES_SINCE_S = 4 * 86_400
"""An invoice is created when its period has ended; with three days of grace it is found within this."""
NOTICE_TYPES = ("v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found")
FINAL = frozenset({"open", "paid", "uncollectible"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Invoice:
    """The line of one meter on the invoice of one period.

    Attributes:
        units: None while it may still change.
        problem: why the line can't be used; empty when it can.
    """

    invoice_id: str
    units: int | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """Stripe rejected an event after it had answered 200.

    Attributes:
        created_s: when Stripe noticed, seconds since the epoch.
        idempotency_key: of the request.
    """

    created_s: int
    idempotency_key: str
    why: str


class Reads(Protocol):
    """What billing asks Stripe. Each raises `RetryLater` when there is no usable answer."""

    async def summary(self, key: AccountKey, event_name: str, start: int, end: int) -> int:
        """Units in `[start, end)`, milliseconds on the minute."""

    async def invoice(self, key: AccountKey, event_name: str) -> Invoice | None:
        """The meter's line on the invoice of the account's period; None: there is no such invoice."""

    async def subscription_problem(self, key: AccountKey, event_name: str) -> str:
        """Why no invoice of exactly this period will show the meter; empty: one will."""

    async def notices(self, since_s: int) -> Sequence[Notice]:
        """What was rejected since a moment, oldest first."""


class StripeReads:
    """Asks in threads, one question after the other in each."""

    def __init__(self, client: stripe.StripeClient) -> None:
        self._client = client
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="stripe-reads")
        self._meters: Mapping[str, str] = {}
        self._prices: dict[str, Any] = {}

    def close(self) -> None:
        """Ask nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def summary(self, key: AccountKey, event_name: str, start: int, end: int) -> int:
        """See `Reads`."""
        return await self._ask(self._summary, key.customer, event_name, start // 1000, end // 1000)

    async def invoice(self, key: AccountKey, event_name: str) -> Invoice | None:
        """See `Reads`."""
        return await self._ask(self._invoice, key, event_name)

    async def subscription_problem(self, key: AccountKey, event_name: str) -> str:
        """See `Reads`."""
        return await self._ask(self._subscription_problem, key, event_name)

    async def notices(self, since_s: int) -> Sequence[Notice]:
        """See `Reads`."""
        return await self._ask(self._notices, since_s)

    async def _ask(self, question: Callable[..., T], *args: Any) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, question, *args)
        except ANSWERLESS as error:
            raise RetryLater(f"Stripe did not answer: {classify(error, '').detail}") from error

    # -- one question each; in a thread

    def _meter_id(self, event_name: str) -> str:
        if event_name not in self._meters:
            listed = self._client.v1.billing.meters.list({"limit": 100}).auto_paging_iter()
            self._meters = {meter.event_name: meter.id for meter in listed if meter.status == "active"}
        if event_name not in self._meters:
            raise RetryLater(f"Stripe has no active meter of event name {event_name!r}")
        return self._meters[event_name]

    def _summary(self, customer: str, event_name: str, start_s: int, end_s: int) -> int:
        listed = self._client.v1.billing.meters.event_summaries.list(
            self._meter_id(event_name),
            {"customer": customer, "start_time": start_s, "end_time": end_s, "limit": 100},
        )
        values = [summary.aggregated_value for summary in listed.auto_paging_iter()]
        if any(value != int(value) for value in values):
            raise RetryLater(f"the summary of {customer} on {event_name} holds fractions: {values}")
        return sum(int(value) for value in values)

    def _price(self, price_id: str) -> Any:
        if price_id not in self._prices:
            self._prices[price_id] = self._client.v1.prices.retrieve(price_id)
        return self._prices[price_id]

    def _counts_on(self, price_id: str, meter_id: str) -> bool:
        recurring = self._price(price_id).recurring
        return recurring is not None and getattr(recurring, "meter", None) == meter_id

    def _invoice(self, key: AccountKey, event_name: str) -> Invoice | None:
        meter_id = self._meter_id(event_name)
        period = (key.period_start // 1000, key.period_end // 1000)
        end_s = period[1]
        listed = self._client.v1.invoices.list(
            {
                "customer": key.customer,
                "created": {"gte": end_s - INVOICES_SINCE_S, "lte": end_s + INVOICES_SINCE_S},
                "limit": 100,
            }
        )
        for invoice in listed.auto_paging_iter():
            units: dict[str, int] = {}
            for line in self._client.v1.invoices.line_items.list(
                str(invoice.id), {"limit": 100}
            ).auto_paging_iter():
                details = line.pricing.price_details if line.pricing else None
                if details is None or (line.period.start, line.period.end) != period:
                    continue
                price_id = details.price if isinstance(details.price, str) else details.price.id
                if self._counts_on(price_id, meter_id):
                    # Tiers are lines of their own, of one price.
                    units[price_id] = units.get(price_id, 0) + int(line.quantity or 0)
            if units:
                return self._line(str(invoice.id), str(invoice.status), units)
        return None

    def _line(self, invoice_id: str, status: str, units: Mapping[str, int]) -> Invoice:
        if status == "void":
            return Invoice(invoice_id, problem="invoice_void")
        if len(units) > 1 or any(self._price(price).transform_quantity for price in units):
            return Invoice(invoice_id, problem="price_unusable")
        (quantity,) = units.values()
        return Invoice(invoice_id, quantity if status in FINAL else None)

    def _subscription_problem(self, key: AccountKey, event_name: str) -> str:
        meter_id = self._meter_id(event_name)
        listed = self._client.v1.subscriptions.list({"customer": key.customer, "limit": 100})
        items = [
            item
            for subscription in listed.auto_paging_iter()
            for item in subscription["items"].data
            if self._counts_on(item.price.id, meter_id)
        ]
        if not items:
            return "no_subscription"
        if len(items) > 1 or self._price(items[0].price.id).transform_quantity:
            return "price_unusable"
        there = (items[0].current_period_start * 1000, items[0].current_period_end * 1000)
        return "" if there == (key.period_start, key.period_end) else "other_period"

    def _notices(self, since_s: int) -> list[Notice]:
        since = datetime.fromtimestamp(since_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        events = self._client.v2.core.events.list(
            {"types": list(NOTICE_TYPES), "created": {"gte": since}, "limit": 100}
        )
        found = []
        for listed in events.auto_paging_iter():
            event: Any = listed
            if not getattr(event, "data", None):
                event = self._client.v2.core.events.retrieve(listed.id)
            created_s = int(datetime.fromisoformat(str(event.created)).timestamp())
            found += [
                Notice(created_s, sample.request.identifier, f"{kind.code}: {sample.error_message}")
                for kind in event.data.reason.error_types
                for sample in kind.sample_errors
            ]
        return sorted(found, key=lambda notice: notice.created_s)
