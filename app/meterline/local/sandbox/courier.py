"""Deliveries of events to their destinations: signed, at least once, in no order, again after a failure."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json

import aiohttp

from meterline.local.sandbox.books import Books
from meterline.local.sandbox.event_destinations import INVOICE_CREATED
from meterline.local.sandbox.rules import HOUR_S
from meterline.local.sandbox.state import Change, Delivery, JsonObject

__all__ = ["RETRY_AFTER_S", "Courier", "signature"]

RETRY_AFTER_S = (60, HOUR_S, 6 * HOUR_S)
"""Of the sandbox's time: a test account's three retries "over a few hours". Stripe names no times."""
TIMEOUT_S = 10.0
AT_ONCE_MAX = 20
"""Deliveries under way; a receiver of a test handles one at a time."""
INTERVAL_S = 0.1
"""Real seconds between looks at what is due; so often time also passes by itself."""


class Courier:
    """Delivers what is due, of one sandbox."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def run(self) -> None:
        """Until it is cancelled."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:
            while True:
                now = self._books.now()
                pending = self._books.state.deliveries.values()
                due = [delivery for delivery in pending if delivery.next_at <= now][:AT_ONCE_MAX]
                await asyncio.gather(*(self._deliver(session, delivery) for delivery in due))
                await self._books.flushed()
                await asyncio.sleep(0 if due else INTERVAL_S)

    async def _deliver(self, session: aiohttp.ClientSession, delivery: Delivery) -> None:
        state = self._books.state
        destination = state.event_destinations[delivery.destination]
        event = state.events.get(delivery.event) or state.snapshot_events[delivery.event]
        body = json.dumps(_payload(event)).encode()
        endpoint = destination["webhook_endpoint"]
        sent_at = self._books.now()
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": signature(body, endpoint["signing_secret"], sent_at),
        }
        try:
            async with session.post(endpoint["url"], data=body, headers=headers) as answer:
                arrived = answer.ok
        except (aiohttp.ClientError, TimeoutError):
            arrived = False
        now = self._books.now()
        attempts = delivery.attempts + 1
        again = not arrived and attempts <= len(RETRY_AFTER_S)
        changes: list[Change] = [
            {
                "kind": "delivery",
                "event": delivery.event,
                "destination": delivery.destination,
                "attempts": attempts,
                "next_at": sent_at + RETRY_AFTER_S[attempts - 1] if again else None,
            }
        ]
        if arrived and event["type"] == INVOICE_CREATED:
            changes += self._told_of_draft(event["data"]["object"]["id"], now)
        self._books.commit(now, changes)

    def _told_of_draft(self, invoice_id: str, now: int) -> list[Change]:
        """A draft becomes final no earlier than an hour after its `invoice.created` was answered.

        Only where the account has no finalization time of its own (docs, workflow transitions).
        """
        state = self._books.state
        invoice = state.invoices[invoice_id]
        if invoice["status"] != "draft" or state.rules.invoice_grace_s != HOUR_S:
            return []
        told = {"automatically_finalizes_at": now + HOUR_S, "webhooks_delivered_at": now}
        return [{"kind": "invoice", "object": invoice | told}]


def signature(body: bytes, secret: str, now: int) -> str:
    """The `Stripe-Signature` header of a delivery: HMAC-SHA256 of "time.body"."""
    signed = hmac.new(secret.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={now},v1={signed}"


def _payload(event: JsonObject) -> JsonObject:
    """What is delivered: thin events without their data, which the receiver fetches."""
    if event["object"] == "event":
        return event
    return {name: value for name, value in event.items() if name != "data"}
