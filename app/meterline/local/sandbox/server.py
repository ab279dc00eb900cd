"""Stripe's HTTP layer: API key, headers, limits, and the faults that were asked for.

API key -> faults -> rate limits -> well-formed parameters -> the write or read -> answer
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from functools import lru_cache
from typing import TypeAlias

from aiohttp import web

from meterline.local.sandbox.answers import answer, break_off, refusal
from meterline.local.sandbox.api_key import check_api_key
from meterline.local.sandbox.books import Books
from meterline.local.sandbox.control import Control
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.faults import Action, Fault, Faults, fault_refusal
from meterline.local.sandbox.form import Params, decode_form, decode_json
from meterline.local.sandbox.idempotency import Request
from meterline.local.sandbox.rate_limits import RateLimits
from meterline.local.sandbox.routes import READS, WRITES, Read, Write
from meterline.local.sandbox.writes import Writes

__all__ = ["API_VERSION", "Server"]

API_VERSION = "2026-10-28.endive"
"""The version named where a request names none: what the pinned stripe-python sends."""
BODY_BYTES_MAX = 64 * 1024
"""One request; the largest served one, a customer with full metadata, has half of it."""

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

FAULT: web.RequestKey[Fault | None] = web.RequestKey("fault", Fault)


class Server:
    """The sandbox's web application over its books."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._writes = Writes(books)
        self._limits = RateLimits(books.state)
        self._faults = Faults()

    def application(self) -> web.Application:
        """Every route; what is not listed is answered with Stripe's 404."""
        app = web.Application(middlewares=[self._speak_stripe], client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/healthz", _healthz)
        app.router.add_routes(Control(self._books, self._faults).routes())
        for path, read in READS.items():
            app.router.add_get(path, self._reader(read), allow_head=False)
        for path, write in WRITES.items():
            app.router.add_post(path, self._writer(write))
        return app

    @web.middleware
    async def _speak_stripe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, turn errors into Stripe's bodies, and put Stripe's headers on every answer."""
        response: web.StreamResponse
        try:
            if request.path != "/healthz":
                check_api_key(request.headers.get("Authorization", ""))
            response = await self._meet_faults(request, handler)
        except StripeError as error:
            response = refusal(error)
        except web.HTTPRequestEntityTooLarge:
            response = refusal(StripeError(413, f"A request may have at most {BODY_BYTES_MAX} bytes."))
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            text = (
                f"Unrecognized request URL ({request.method}: {request.path}). The sandbox doesn't serve it."
            )
            response = refusal(StripeError(404, text))
        if response.prepared:
            return response
        headers = response.headers
        headers["Date"] = _http_date(int(self._books.clock()))
        headers["Request-Id"] = f"req_{secrets.token_hex(8)}"
        headers["Stripe-Version"] = request.headers.get("Stripe-Version", API_VERSION)
        if key := request.headers.get("Idempotency-Key"):
            headers["Idempotency-Key"] = key
        return response

    async def _meet_faults(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handle a request of Stripe's API as its fault, if it meets one, and the rate limits have it."""
        if not request.path.startswith(("/v1/", "/v2/")):
            return await handler(request)
        now = self._books.now()
        fault = self._faults.hit(request.method, request.path, now)
        request[FAULT] = fault
        if fault is None:
            self._limits.admit(request.path, now)
            return await handler(request)
        if fault.action in {Action.DROP_BEFORE, Action.DOWN}:
            return await break_off(request, None)
        if (refused := fault_refusal(fault)) is not None:
            raise refused
        response = await handler(request)
        if fault.action is Action.DROP_AFTER:
            return await break_off(request, None)
        if fault.action is Action.TRUNCATE:
            return await break_off(request, response)
        return response

    def _reader(self, read: Read) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            params = Params(decode_form(request.rel_url.raw_query_string))
            await _read_fault(request[FAULT])
            now = self._books.now()
            try:
                return answer(200, read(self._books.state, params, request.match_info.get("id", ""), now))
            finally:
                # What was read may not be on disk yet; nobody may hear of it before it is.
                await self._books.flushed()

        return handle

    def _writer(self, write: Write) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            data = await request.read()
            is_json = request.path.startswith("/v2/")
            fields = decode_json(data) if is_json else decode_form(_form_text(request, data))
            params = Params(fields)
            command = write(params, request.match_info.get("id", ""))
            params.finish()
            keyed = Request.of(request.headers.get("Idempotency-Key", ""), request.path, fields)
            done, replayed = await self._writes.do(command, keyed, self._books.now(), request[FAULT])
            return answer(done.status, done.body, should_retry=done.should_retry, replayed=replayed)

        return handle


async def _read_fault(fault: Fault | None) -> None:
    """What a fault does to a read that is answered at all."""
    if fault is None:
        return
    if fault.action is Action.SLOW:
        await asyncio.sleep(fault.delay_s)
    if fault.action in {Action.ERROR_BEFORE, Action.ERROR_AFTER}:
        raise StripeError(500, "An unknown error occurred.", kind="api_error")


@lru_cache(maxsize=1)
def _http_date(now: int) -> str:
    """One second has thousands of answers."""
    return formatdate(now, usegmt=True)


async def _healthz(_request: web.Request) -> web.Response:
    return web.json_response({"pid": os.getpid(), "status": "ok"})


def _form_text(request: web.Request, data: bytes) -> str:
    """The request's form as text; raises StripeError 400 for anything else."""
    if data and request.content_type != "application/x-www-form-urlencoded":
        raise StripeError(400, "Send parameters form-encoded (application/x-www-form-urlencoded).")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise StripeError(400, "Percent-encode everything that isn't ASCII.") from None
