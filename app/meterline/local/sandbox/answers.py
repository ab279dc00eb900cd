"""Answers as Stripe writes them, and connections that break on purpose."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from meterline.local.sandbox.errors import StripeError

__all__ = ["answer", "break_off", "refusal"]


def answer(
    status: int, body: dict[str, Any], *, should_retry: bool | None = None, replayed: bool = False
) -> web.Response:
    """A JSON answer with what Stripe's SDKs look at."""
    response = web.Response(body=json.dumps(body).encode(), status=status, content_type="application/json")
    if should_retry is not None:
        response.headers["Stripe-Should-Retry"] = str(should_retry).lower()
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def refusal(error: StripeError) -> web.Response:
    """An error's answer."""
    response = answer(error.status, error.body(), should_retry=error.should_retry)
    response.headers.update(error.headers)
    return response


async def break_off(request: web.Request, response: web.StreamResponse | None) -> web.StreamResponse:
    """Close the connection: in the middle of an answer's body, or before there was one."""
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        whole = response.body
        partial = web.StreamResponse(status=response.status, headers=response.headers)
        partial.content_length = len(whole)
        await partial.prepare(request)
        await partial.write(whole[: len(whole) // 2])
    if request.transport is not None:
        request.transport.close() if response else request.transport.abort()
    return response or web.Response()
