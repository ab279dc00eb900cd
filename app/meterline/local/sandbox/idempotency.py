"""Idempotency keys: one key, one result. API v1 and v2 mean different things by that.

    v1  the first result, whatever it was and 500s too, is replayed for 24 hours; after that the key is new
    v2  a success is kept for 30 days; a failure is executed again

Under one key, other parameters are an error, and a request that is still running is a conflict.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Field
from meterline.local.sandbox.limits import (
    IDEMPOTENCY_KEY_LENGTH_MAX,
    KEY_REMEMBERED_S,
    V2_KEY_REMEMBERED_S,
    still_remembered,
)
from meterline.local.sandbox.state import Change, State, StoredAnswer

__all__ = ["Keys", "Request"]

OK = 200


@dataclass(frozen=True, slots=True)
class Request:
    """What a key stands for.

    Attributes:
        key: "" where the request has none.
        fingerprint: of the endpoint and every parameter, in whatever order they came.
    """

    key: str
    fingerprint: str
    v2: bool

    @classmethod
    def of(cls, key: str, path: str, fields: dict[str, Field]) -> Request:
        """Take the key of a request; raises StripeError 400 for one that is too long."""
        if len(key) > IDEMPOTENCY_KEY_LENGTH_MAX:
            raise StripeError(400, f"Idempotency-Key: at most {IDEMPOTENCY_KEY_LENGTH_MAX} characters.")
        fingerprint = (
            hashlib.sha256(json.dumps([path, fields], sort_keys=True).encode()).hexdigest() if key else ""
        )
        return cls(key, fingerprint, v2=path.startswith("/v2/"))


class Keys:
    """The keys of one sandbox: those in use now, and those in its state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._in_use: set[str] = set()

    def stored(self, request: Request, now: int) -> StoredAnswer | None:
        """The key's first result, if it has one; it is on disk, because the key was in use until then.

        Raises:
            StripeError: 400 for other parameters, 409 while the first request still runs.
        """
        if request.key in self._in_use:
            raise StripeError(
                409,
                f"Another request with the idempotency key {request.key} is still running. Try again when it "
                "has ended.",
                kind="idempotency_error",
                code="idempotency_key_in_use",
            )
        answers = self._state.v2_answers if request.v2 else self._state.answers
        remembered_s = V2_KEY_REMEMBERED_S if request.v2 else KEY_REMEMBERED_S
        stored = answers.get(request.key)
        if stored is None or not still_remembered(stored.stored_at, now, remembered_s):
            return None
        if stored.fingerprint != request.fingerprint:
            raise StripeError(
                400,
                f"The idempotency key {request.key} was first used with another endpoint or other "
                "parameters. Use a new key for a new request.",
                kind="idempotency_error",
            )
        return stored

    @contextmanager
    def holding(self, request: Request) -> Iterator[None]:
        """Nobody else gets the key meanwhile."""
        keys = {request.key} if request.key else set()
        self._in_use |= keys
        try:
            yield
        finally:
            self._in_use -= keys

    def to_store(self, request: Request, answer: StoredAnswer) -> list[Change]:
        """The change that keeps a result under its key; none where there is nothing to keep."""
        if not request.key or (request.v2 and answer.status != OK):
            return []
        return [
            {
                "kind": "answer",
                "key": request.key,
                "v2": request.v2,
                "fingerprint": answer.fingerprint,
                "status": answer.status,
                "body": answer.body,
                "should_retry": answer.should_retry,
                "at": answer.stored_at,
            }
        ]
