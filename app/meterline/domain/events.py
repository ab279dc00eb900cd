"""The usage event: its fields, its rules, its identity."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from hashlib import blake2b
from types import MappingProxyType
from typing import NamedTuple

from meterline.domain.credits import CREDITS_MICRO_MAX
from meterline.domain.encoding import hash_hex, netstring, repeated_netstring
from meterline.domain.reasons import Reason
from meterline.errors import DeadLetterError

__all__ = [
    "ATTRIBUTES_MAX",
    "ATTRIBUTE_KEY_BYTES_MAX",
    "ATTRIBUTE_VALUE_BYTES_MAX",
    "FUTURE_MAX_MS",
    "ID_BYTES_MAX",
    "Correction",
    "CorrectionKind",
    "UsageEvent",
    "check_event",
    "default_event_id",
    "identity_hash",
    "payload_digest",
]

ID_BYTES_MAX = 200
"""Client, event, correlation, SKU, source and reservation ids: long enough for two UUIDs and a prefix, short
enough that a window of the largest number of SKUs fits one Kafka record."""
_SURELY_SHORT = ID_BYTES_MAX // 4
"""Characters that never take more than the limit in UTF-8: most ids need no closer look."""

ATTRIBUTES_MAX = 64
ATTRIBUTE_KEY_BYTES_MAX = 200
ATTRIBUTE_VALUE_BYTES_MAX = 4_096
"""64 attributes of this size stay below the source record limit of 512 KiB."""
FUTURE_MAX_MS = 5 * 60_000
"""How far `occurred_at` may be ahead of the broker's append time: Stripe's own limit for meter events."""


class CorrectionKind(StrEnum):
    """What a correcting event does to the one it names."""

    AMEND = "amend"
    VOID = "void"
    TWIN = "twin"


class Correction(NamedTuple):
    """Which event is corrected, and where the corrected copy stands in the log."""

    event_id: str
    kind: CorrectionKind
    topic_id: str
    partition: int
    offset: int


class UsageEvent(NamedTuple):
    """One finished task of one client, in one SKU.

    `credits_micro` is exact (1 credit = 1,000,000); `occurred_at` is milliseconds since the epoch, UTC. The
    order of the fields is the schema's. (A named tuple: on the hot path a frozen dataclass costs four times
    as much to make.)
    """

    event_id: str
    client_id: str
    correlation_id: str
    sku: str
    credits_micro: int
    occurred_at: int
    source: str = ""
    attributes: Mapping[str, str] = MappingProxyType({})
    reservation_id: str | None = None
    billable: bool = True
    corrects: Correction | None = None


def default_event_id(client_id: str, correlation_id: str, sku: str, item: int = 0) -> str:
    """The deterministic id of a task's charge: a task that is run again after a crash is billed once.

    Args:
        item: tells apart several charges of one task in one SKU.

    Returns:
        32 hexadecimal digits: BLAKE2b-128 over the canonical bytes (golden vectors: `schemas/golden`).
    """
    return hash_hex("meterline.event-id.1", client_id, correlation_id, sku, item)


_IDENTITY_TAG = netstring("meterline.identity.1")
_PAYLOAD_TAG = netstring("meterline.payload.1")


def identity_hash(client_id: str, event_id: str) -> int:
    """96 bits of BLAKE2b over the identity (client, event id), as an unsigned integer."""
    data = _IDENTITY_TAG + repeated_netstring(client_id) + netstring(event_id)
    return int.from_bytes(blake2b(data, digest_size=12).digest(), "big")


def payload_digest(event: UsageEvent) -> int:
    """64 bits of BLAKE2b over what a second copy must agree in: client, SKU, credits, billable, corrects.

    Time, source and attributes are left out: a retried task may report them anew.
    """
    data = _PAYLOAD_TAG + repeated_netstring(event.client_id) + repeated_netstring(event.sku)
    data += netstring(str(event.credits_micro)) + (b"1:1," if event.billable else b"1:0,")
    if event.corrects is not None:
        data += b"".join(netstring(str(part)) for part in event.corrects)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def check_event(event: UsageEvent, appended_at: int) -> None:
    """The rules a usage event must meet, judged with the broker's append time (milliseconds).

    Raises:
        DeadLetterError: with the reason code of the first rule that is broken.
    """
    ids = (event.client_id, event.event_id, event.correlation_id, event.sku)
    longest = max(*map(len, ids), len(event.source), len(event.reservation_id or ""))
    if longest > _SURELY_SHORT or not all(ids):
        _check_ids(event)
    if event.attributes:
        _check_attributes(event.attributes)
    if event.credits_micro < 0 and event.corrects is None:
        raise DeadLetterError(
            Reason.NEGATIVE_CREDITS,
            f"credits are {event.credits_micro} micro-credits; only an event with `corrects` may be negative",
        )
    if abs(event.credits_micro) > CREDITS_MICRO_MAX:
        raise DeadLetterError(
            Reason.CREDITS_OUT_OF_RANGE,
            f"{event.credits_micro} micro-credits are beyond the limit of {CREDITS_MICRO_MAX} for one event",
        )
    if event.occurred_at > appended_at + FUTURE_MAX_MS:
        raise DeadLetterError(
            Reason.TIME_IN_FUTURE,
            f"occurred_at is {event.occurred_at - appended_at} ms ahead of the broker's append time",
        )
    if event.occurred_at < 0:
        raise DeadLetterError(Reason.INVALID_FIELD, f"occurred_at {event.occurred_at} is before 1970")


def _check_ids(event: UsageEvent) -> None:
    for name in ("client_id", "event_id", "correlation_id", "sku", "source", "reservation_id"):
        value = getattr(event, name)
        if not value and name not in {"source", "reservation_id"}:
            raise DeadLetterError(Reason.INVALID_FIELD, f"{name} is empty")
        if value and len(value.encode()) > ID_BYTES_MAX:
            raise DeadLetterError(Reason.INVALID_FIELD, f"{name} is longer than {ID_BYTES_MAX} bytes")


def _check_attributes(attributes: Mapping[str, str]) -> None:
    if len(attributes) > ATTRIBUTES_MAX:
        raise DeadLetterError(Reason.INVALID_FIELD, f"more than {ATTRIBUTES_MAX} attributes")
    for key, value in attributes.items():
        if len(key.encode()) > ATTRIBUTE_KEY_BYTES_MAX or len(value.encode()) > ATTRIBUTE_VALUE_BYTES_MAX:
            raise DeadLetterError(Reason.INVALID_FIELD, f"attribute {key[:40]!r} is too long")
