"""One write from its parameters to its answer: keys, locks, rules, journal. Decides nothing about money.

    stored answer of the key -> locks -> the resource's rules -> journal on disk -> answer

Only what comes after the locks is stored under the key.
"""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from meterline.local.sandbox.books import Books
from meterline.local.sandbox.command import Call, Command
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.faults import Action, Fault
from meterline.local.sandbox.idempotency import Keys, Request
from meterline.local.sandbox.state import Change, StoredAnswer

__all__ = ["Writes"]

CONFLICT, TOO_MANY = 409, 429


class Writes:
    """All writes of one sandbox."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._keys = Keys(books.state)
        self._locks: set[str] = set()

    async def do(
        self, command: Command, request: Request, now: int, fault: Fault | None
    ) -> tuple[StoredAnswer, bool]:
        """Do it, or repeat what its key did before.

        Returns:
            The answer, and whether it is a replay.

        Raises:
            StripeError: refused before anything of it happened; nothing is stored.
        """
        if stored := self._keys.stored(request, now):
            return stored, True
        with self._keys.holding(request), self._locked(command.lock(self._books.state), v2=request.v2):
            reject_as = fault.code if fault is not None and fault.action is Action.REJECT else ""
            call = Call(now, secrets.token_hex(12), request.key, reject_as)
            answer, changes = self._execute(command, call, request.fingerprint, fault)
            self._books.commit(now, [*changes, *self._keys.to_store(request, answer)])
            # Refusals wait too: "already exists" is only true once the first event is on disk.
            await self._books.flushed()
            if fault is not None and fault.action is Action.SLOW:
                await asyncio.sleep(fault.delay_s)
        return answer, False

    def _execute(
        self, command: Command, call: Call, fingerprint: str, fault: Fault | None
    ) -> tuple[StoredAnswer, list[Change]]:
        """The first result of a write, refusals and crashes included, and all it changes."""
        changes: list[Change] = []
        status, should_retry = 200, None
        action = None if fault is None else fault.action
        try:
            if action is not Action.ERROR_BEFORE:
                outcome = command.execute(self._books.state, call)
                body, changes = outcome.body, list(outcome.changes)
            if action in {Action.ERROR_BEFORE, Action.ERROR_AFTER}:
                status, body = 500, _server_error("An unknown error occurred.").body()
        except StripeError as refused:
            status, body, should_retry = refused.status, refused.body(), refused.should_retry
        except Exception:  # noqa: BLE001 - Stripe answers its own bugs with a 500, and stores that too
            traceback.print_exc()
            status, body = 500, _server_error("The sandbox failed.").body()
        return StoredAnswer(fingerprint, status, body, should_retry, call.now), changes

    @contextmanager
    def _locked(self, lock: str | None, *, v2: bool) -> Iterator[None]:
        """Hold a write's lock until it is on disk.

        A lock that is taken is Stripe's 429 `lock_timeout` without a rate-limit header, which its SDKs retry
        (docs.stripe.com/rate-limits, object lock timeouts). The page names it for locked objects in general;
        for v1 meter events 429 is what the docs say and 409 was seen by a third party, so the rules choose.
        """
        if lock is None:
            yield
            return
        if lock in self._locks:
            status = CONFLICT if v2 else self._books.state.rules.concurrency_status
            code = "too_many_concurrent_requests" if v2 else "lock_timeout" if status == TOO_MANY else None
            raise StripeError(
                status,
                "Another request holds this object. Send the requests for one object one after the other.",
                code=code,
                should_retry=True,
            )
        self._locks.add(lock)
        try:
            yield
        finally:
            self._locks.discard(lock)


def _server_error(message: str) -> StripeError:
    return StripeError(500, message, kind="api_error")
