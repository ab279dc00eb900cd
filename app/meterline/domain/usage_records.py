"""The usage record: what Stripe is told about one window of one client and meter, and its names.

A record is written down before the first byte goes to Stripe and never computed again: every retry sends
exactly what stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meterline.domain.accounts import DAY_S, AccountKey
from meterline.domain.encoding import hash_hex

__all__ = [
    "IDENTIFIER_LENGTH_MAX",
    "RecordState",
    "UsageRecord",
    "idempotency_key",
    "usage_record_identifier",
]

IDENTIFIER_LENGTH_MAX = 100
"""Stripe's limit for a meter event's identifier."""

IDENTIFIER_PREFIX = "mlur_"


class RecordState(StrEnum):
    """Where a usage record stands. The words are stored in the ledger."""

    INTENT = "intent"
    """Written down; nothing was sent."""
    UNKNOWN = "unknown"
    """An attempt was made, or is about to be; whether Stripe has it is not known."""
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    """Stripe already had this identifier: an earlier attempt had arrived."""
    REFUSED = "refused"
    """Stripe will never take it as it is; its text says why."""
    SHADOW = "shadow"
    """It would have been sent, and never will be: sending was in shadow."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One meter event. Times in milliseconds, `event_timestamp` in whole seconds as Stripe wants it.

    Attributes:
        value: whole units, negative when a window's total fell.
        attempt_key: number of the idempotency key in use; a new one after each 5xx answer.
        held_reason: why it is not sent any more; empty while it may be.
        reissue: how many records its account had made anew before it; 0: it is nobody's replacement.
    """

    identifier: str
    client_id: str
    meter: str
    map_version: int
    period_start: int
    period_end: int
    window_id: str
    window_start: int
    window_end: int
    source_topic_id: str
    source_partition: int
    cutoff_offset: int
    event_name: str
    customer: str
    value: int
    event_timestamp: int
    state: RecordState = RecordState.INTENT
    first_attempt_at: int | None = None
    attempt_key: int = 0
    held_reason: str = ""
    reissue: int = 0

    @property
    def account(self) -> AccountKey:
        """The account whose units it tells."""
        return AccountKey(self.client_id, self.meter, self.period_start, self.period_end, self.customer)

    @property
    def day(self) -> int:
        """The UTC day in whose summary it must show, counted from the epoch."""
        return self.event_timestamp // DAY_S

    @property
    def attempted(self) -> bool:
        """Whether Stripe may have it."""
        return self.first_attempt_at is not None

    @property
    def idempotency_key(self) -> str:
        """The key of the next request."""
        return idempotency_key(self.identifier, self.attempt_key)

    @property
    def lane(self) -> tuple[str, str]:
        """Stripe takes one call at a time per customer and meter."""
        return (self.customer, self.event_name)


def usage_record_identifier(
    installation_id: str, client_id: str, meter: str, window_id: str, cutoff_offset: int, *, reissue: int = 0
) -> str:
    """Stripe's name of a usage record; the same inputs give the same name (golden vectors: `schemas/golden`).

    Stripe refuses a second event of the same identifier for at least 24 hours. The installation is part of
    it, so two installations on one Stripe account never collide; `reissue` counts the times a record that
    is proven missing was sent anew.
    """
    return IDENTIFIER_PREFIX + hash_hex(
        "meterline.usage-record.1", installation_id, client_id, meter, window_id, cutoff_offset, reissue
    )


def idempotency_key(identifier: str, attempt_key: int) -> str:
    """The `Idempotency-Key` of a request, one per answer Stripe stores: it replays a stored 500 for ever."""
    return f"{identifier}:{attempt_key}"
