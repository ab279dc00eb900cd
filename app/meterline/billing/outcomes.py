"""What an answer of Stripe means for a usage record: one pure function over everything the SDK can raise.

| answer | outcome | then |
|---|---|---|
| 200 with our event | accepted | done |
| 400 "An event already exists with identifier <ours>" | duplicate | done: an earlier attempt had arrived |
| no answer, broken off, or no JSON | unknown | the same request again |
| 5xx | unknown | same identifier, new idempotency key: Stripe replays a stored 500 for ever |
| 409, 429 | retry_later | nothing was recorded; the same request again, with back-off |
| 401, 403 | stop | no request can succeed: sending stops, consuming goes on |
| idempotency error | mutated | a record changed between attempts: a bug, the partition halts |
| other 4xx | refused | held, with Stripe's text |

Every unknown is retried under the same identifier, so Stripe counts it once whatever happened before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from http.client import HTTPException

import stripe

__all__ = ["ANSWERLESS", "Answer", "Outcome", "classify"]

ANSWERLESS = (stripe.StripeError, OSError, HTTPException)
"""What a request can raise. The SDK lets some of the HTTP library's errors through; they are OSErrors."""

DETAIL_CHARS_MAX = 500
"""A proxy may answer with a whole page; its start says enough."""

_DUPLICATE = re.compile(r"An event already exists with identifier (\S+?)\.?(\s|$)")
"""v1 has no error code for it; this text was observed in production and in test mode in 2026."""

_NOTHING_RECORDED = frozenset({HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})
_NO_PERMISSION = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


class Answer(StrEnum):
    """The kinds of outcomes; also the label of the metric of requests."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    UNKNOWN = "unknown"
    RETRY_LATER = "retry_later"
    REFUSED = "refused"
    STOP = "stop"
    MUTATED = "mutated"
    NOT_SENT = "not_sent"
    """We took too long between commit and request: perhaps somebody else owns the partition by now."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        detail: Stripe's text, or what went wrong on the way.
        new_key: the next attempt needs a new idempotency key.
    """

    answer: Answer
    detail: str = ""
    request_id: str = ""
    new_key: bool = False


def classify(error: BaseException, identifier: str) -> Outcome:
    """The outcome of a request that raised one of `ANSWERLESS`."""
    status = getattr(error, "http_status", None)
    text = getattr(error, "user_message", None) or str(error)
    duplicate = _DUPLICATE.search(text)
    new_key = False
    if isinstance(error, stripe.IdempotencyError):
        answer = Answer.MUTATED
    elif not isinstance(status, int) or status < HTTPStatus.BAD_REQUEST:
        answer = Answer.UNKNOWN
    elif status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        answer, new_key = Answer.UNKNOWN, True
    elif status in _NO_PERMISSION:
        answer = Answer.STOP
    elif status in _NOTHING_RECORDED:
        answer = Answer.RETRY_LATER
    elif duplicate and duplicate[1] == identifier:
        answer = Answer.DUPLICATE
    else:
        answer = Answer.REFUSED
    detail = f"{type(error).__name__}: {text}"[:DETAIL_CHARS_MAX]
    return Outcome(answer, detail, getattr(error, "request_id", None) or "", new_key)
