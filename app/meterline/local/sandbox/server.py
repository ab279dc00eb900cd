"""Stripe's HTTP layer: API key, headers, idempotency keys, locks. Decides nothing about money.

A write passes these, in Stripe's order; only what comes after the locks is stored under its key:

    API key -> well-formed parameters -> stored answer of the key -> locks -> the resource's rules
            -> journal on disk -> answer
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any, TypeAlias

from aiohttp import web

from meterline.local.sandbox import (
    customers,
    event_summaries,
    invoices,
    meter_events,
    meters,
    prices,
    subscriptions,
)
from meterline.local.sandbox.api_key import check_api_key
from meterline.local.sandbox.books import Books
from meterline.local.sandbox.command import Call, Command
from meterline.local.sandbox.control import Control
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Field, Params, decode_form
from meterline.local.sandbox.limits import IDEMPOTENCY_KEY_LENGTH_MAX, KEY_REMEMBERED_S, still_remembered
from meterline.local.sandbox.state import Change, JsonObject, State, StoredAnswer

__all__ = ["API_VERSION", "Server"]

API_VERSION = "2026-10-28.endive"
"""The version named where a request names none: what the pinned stripe-python sends."""
BODY_BYTES_MAX = 64 * 1024
"""One request; the largest served one, a customer with full metadata, has half of it."""

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

WRITES: Mapping[str, Callable[[Params, str], Command]] = {
    "/v1/customers": customers.CreateCustomer.parse,
    "/v1/billing/meters": meters.CreateMeter.parse,
    "/v1/billing/meters/{id}/deactivate": meters.DeactivateMeter.parse,
    "/v1/billing/meters/{id}/reactivate": meters.ReactivateMeter.parse,
    "/v1/billing/meter_events": meter_events.CreateMeterEvent.parse,
    "/v1/products": prices.CreateProduct.parse,
    "/v1/prices": prices.CreatePrice.parse,
    "/v1/subscriptions": subscriptions.CreateSubscription.parse,
    "/v1/subscriptions/{id}": subscriptions.UpdateSubscription.parse,
    "/v1/invoices/{id}/finalize": invoices.FinalizeInvoice.parse,
}
READS: Mapping[str, Callable[[State, Params, str, int], JsonObject]] = {
    "/v1/customers": customers.list_customers,
    "/v1/customers/{id}": customers.retrieve_customer,
    "/v1/billing/meters": meters.list_meters,
    "/v1/billing/meters/{id}": meters.retrieve_meter,
    "/v1/billing/meters/{id}/event_summaries": event_summaries.list_event_summaries,
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


class Server:
    """The sandbox's web application over its books."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._state = books.state
        self._keys_in_use: set[str] = set()
        self._locks: set[str] = set()

    def application(self) -> web.Application:
        """Every route; what is not listed is answered with Stripe's 404."""
        app = web.Application(middlewares=[self._speak_stripe], client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/healthz", _healthz)
        app.router.add_routes(Control(self._books).routes())
        for path, read in READS.items():
            app.router.add_get(path, self._reader(read), allow_head=False)
        for path, parse in WRITES.items():
            app.router.add_post(path, self._writer(parse))
        return app

    @web.middleware
    async def _speak_stripe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, turn errors into Stripe's bodies, and put Stripe's headers on every answer."""
        response: web.StreamResponse
        try:
            if request.path != "/healthz":
                check_api_key(request.headers.get("Authorization", ""))
            response = await handler(request)
        except StripeError as error:
            response = _answer(error.status, error.body(), should_retry=error.should_retry)
        except web.HTTPRequestEntityTooLarge:
            response = _error(StripeError(413, f"A request may have at most {BODY_BYTES_MAX} bytes."))
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            text = (
                f"Unrecognized request URL ({request.method}: {request.path}). The sandbox doesn't serve it."
            )
            response = _error(StripeError(404, text))
        response.headers["Date"] = formatdate(int(self._books.clock()), usegmt=True)
        response.headers["Request-Id"] = f"req_{secrets.token_hex(8)}"
        response.headers["Stripe-Version"] = request.headers.get("Stripe-Version", API_VERSION)
        if key := request.headers.get("Idempotency-Key"):
            response.headers["Idempotency-Key"] = key
        return response

    def _reader(self, read: Callable[[State, Params, str, int], JsonObject]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            params = Params(decode_form(request.rel_url.raw_query_string))
            now = self._books.now()
            try:
                return _answer(200, read(self._state, params, request.match_info.get("id", ""), now))
            finally:
                # What was read may not be on disk yet; nobody may hear of it before it is.
                await self._books.flushed()

        return handle

    def _writer(self, parse: Callable[[Params, str], Command]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            fields = decode_form(await _form_body(request))
            params = Params(fields)
            command = parse(params, request.match_info.get("id", ""))
            params.finish()
            key = request.headers.get("Idempotency-Key", "")
            if len(key) > IDEMPOTENCY_KEY_LENGTH_MAX:
                raise StripeError(400, f"Idempotency-Key: at most {IDEMPOTENCY_KEY_LENGTH_MAX} characters.")
            now = self._books.now()
            fingerprint = _fingerprint(request.path, fields)
            if key in self._keys_in_use:
                raise _key_in_use(key)
            if stored := self._stored_answer(key, fingerprint, now):
                return _answer(stored.status, stored.body, should_retry=stored.should_retry, replayed=True)
            with self._holding(key, command.lock(self._state)):
                call = Call(now=now, token=secrets.token_hex(12), idempotency_key=key)
                answer, changes = self._execute(command, call, fingerprint)
                self._books.commit(now, changes)
                # Refusals wait too: "already exists" is only true once the first event is on disk.
                await self._books.flushed()
            return _answer(answer.status, answer.body, should_retry=answer.should_retry)

        return handle

    def _execute(self, command: Command, call: Call, fingerprint: str) -> tuple[StoredAnswer, list[Change]]:
        """The first result of a write, refusals and crashes included, and all it changes."""
        changes: list[Change] = []
        status, should_retry = 200, None
        try:
            outcome = command.execute(self._state, call)
            body, changes = outcome.body, list(outcome.changes)
        except StripeError as refusal:
            status, body, should_retry = refusal.status, refusal.body(), refusal.should_retry
        except Exception:  # noqa: BLE001 - Stripe answers its own bugs with a 500, and stores that too
            traceback.print_exc()
            status, body = 500, StripeError(500, "The sandbox failed.", kind="api_error").body()
        answer = StoredAnswer(fingerprint, status, body, should_retry, call.now)
        if call.idempotency_key:
            changes.append(
                {
                    "kind": "answer",
                    "key": call.idempotency_key,
                    "fingerprint": fingerprint,
                    "status": status,
                    "body": body,
                    "should_retry": should_retry,
                    "at": call.now,
                }
            )
        return answer, changes

    def _stored_answer(self, key: str, fingerprint: str, now: int) -> StoredAnswer | None:
        """The key's first result; it is on disk, because the key was in use until then."""
        stored = self._state.answers.get(key)
        if stored is None or not still_remembered(stored.stored_at, now, KEY_REMEMBERED_S):
            return None
        if stored.fingerprint != fingerprint:
            raise StripeError(
                400,
                f"The idempotency key {key} was first used with another endpoint or other parameters. "
                "Use a new key for a new request.",
                kind="idempotency_error",
            )
        return stored

    @contextmanager
    def _holding(self, key: str, lock: str | None) -> Iterator[None]:
        """Hold a write's key and lock until it is on disk.

        A lock that is taken is Stripe's 429 `lock_timeout` without a rate-limit header, which its SDKs retry
        (docs.stripe.com/rate-limits, object lock timeouts). The page names it for locked objects in general;
        for v1 meter events 429 is what the docs say and 409 was seen once by a third party.
        """
        if lock is not None and lock in self._locks:
            raise StripeError(
                429,
                "Another request holds this object. Send the requests for one object one after the other.",
                code="lock_timeout",
                should_retry=True,
            )
        keys = {key} if key else set()
        locks = {lock} if lock is not None else set()
        self._keys_in_use |= keys
        self._locks |= locks
        try:
            yield
        finally:
            self._keys_in_use -= keys
            self._locks -= locks


async def _healthz(_request: web.Request) -> web.Response:
    return web.json_response({"pid": os.getpid(), "status": "ok"})


async def _form_body(request: web.Request) -> str:
    """The request's form as text; raises StripeError 400 for anything else."""
    data = await request.read()
    if data and request.content_type != "application/x-www-form-urlencoded":
        raise StripeError(400, "Send parameters form-encoded (application/x-www-form-urlencoded).")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise StripeError(400, "Percent-encode everything that isn't ASCII.") from None


def _fingerprint(path: str, fields: dict[str, Field]) -> str:
    """What a key stands for: the endpoint and every parameter, in whatever order they came."""
    return hashlib.sha256(json.dumps([path, fields], sort_keys=True).encode()).hexdigest()


def _key_in_use(key: str) -> StripeError:
    return StripeError(
        409,
        f"Another request with the idempotency key {key} is still running. Try again when it has ended.",
        kind="idempotency_error",
        code="idempotency_key_in_use",
    )


def _error(error: StripeError) -> web.Response:
    return _answer(error.status, error.body(), should_retry=error.should_retry)


def _answer(
    status: int, body: dict[str, Any], *, should_retry: bool | None = None, replayed: bool = False
) -> web.Response:
    response = web.json_response(body, status=status, dumps=_dumps)
    if should_retry is not None:
        response.headers["Stripe-Should-Retry"] = str(should_retry).lower()
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def _dumps(body: Any) -> str:
    return json.dumps(body, indent=2)
