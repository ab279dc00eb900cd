"""What Stripe doesn't have: the sandbox's clock, rules and faults, under `/_sandbox`, in JSON."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from aiohttp import web

from meterline.local.sandbox.books import Books
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.faults import Fault, Faults
from meterline.local.sandbox.state import JsonObject

__all__ = ["Control"]

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Control:
    """The routes of one sandbox's controls."""

    def __init__(self, books: Books, faults: Faults) -> None:
        self._books = books
        self._faults = faults

    def routes(self) -> list[web.RouteDef]:
        """All of them."""
        return [
            web.get("/_sandbox/clock", self._answering(lambda _: self._books.clock.face())),
            web.post("/_sandbox/clock", self._answering(self._move_clock)),
            web.get("/_sandbox/rules", self._answering(lambda _: self._books.state.rules.to_json())),
            web.post("/_sandbox/rules", self._answering(self._change_rules)),
            web.get("/_sandbox/faults", self._answering(lambda _: self._faults.face())),
            web.post("/_sandbox/faults", self._answering(self._add_fault)),
            web.delete("/_sandbox/faults", self._answering(self._clear_faults)),
        ]

    def _move_clock(self, wish: JsonObject) -> JsonObject:
        """Answered when everything has happened that came due on the way."""
        before = self._books.now()
        self._books.commit(before, [self._books.clock.moved(wish)])
        self._books.now()
        return self._books.clock.face()

    def _change_rules(self, values: JsonObject) -> JsonObject:
        rules = self._books.state.rules.changed(values)
        self._books.commit(self._books.now(), [{"kind": "rules", "rules": rules.to_json()}])
        return rules.to_json()

    def _add_fault(self, wish: JsonObject) -> JsonObject:
        fault = Fault.parse(wish, self._books.now())
        self._faults.add(fault)
        return fault.face()

    def _clear_faults(self, _: JsonObject) -> JsonObject:
        """Answers how often each was applied, a last time."""
        counts = self._faults.face()
        self._faults.clear()
        return counts

    def _answering(self, act: Callable[[JsonObject], JsonObject]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            answer = act(await _json_body(request))
            await self._books.flushed()
            return web.json_response(answer)

        return handle


async def _json_body(request: web.Request) -> JsonObject:
    """The body's JSON object; {} where there is no body. Raises StripeError 400 for anything else."""
    data = await request.read()
    if not data:
        return {}
    try:
        body: Any = json.loads(data)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise StripeError(400, "Send one JSON object.")
    return body
