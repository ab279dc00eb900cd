"""Domain types to Avro records and back, and the keys of records that need more than a client."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from meterline.domain.alerts import CreditAlert
from meterline.domain.encoding import canonical, netstring
from meterline.domain.events import Correction, CorrectionKind, UsageEvent
from meterline.domain.grants import BaselinePart, CreditGrant, GrantKind, check_grant
from meterline.domain.reasons import Reason
from meterline.domain.totals import UsageProgress, UsageTotal
from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot
from meterline.errors import DeadLetterError

__all__ = [
    "alert_from_record",
    "alert_to_record",
    "event_from_record",
    "event_to_record",
    "grant_from_record",
    "grant_to_record",
    "is_progress_key",
    "progress_from_record",
    "progress_key",
    "progress_to_record",
    "snapshot_from_record",
    "snapshot_to_record",
    "total_from_record",
    "total_key",
    "total_to_record",
]

_PROGRESS_TAG = "meterline.progress.1"
_PROGRESS_HEAD = netstring(_PROGRESS_TAG)


def event_to_record(event: UsageEvent) -> dict[str, Any]:
    """A `usage-event` record."""
    corrects = event.corrects
    return {
        "event_id": event.event_id,
        "client_id": event.client_id,
        "correlation_id": event.correlation_id,
        "sku": event.sku,
        "credits_micro": event.credits_micro,
        "occurred_at": event.occurred_at,
        "source": event.source,
        "attributes": dict(event.attributes),
        "reservation_id": event.reservation_id,
        "billable": event.billable,
        "corrects": None if corrects is None else corrects._asdict() | {"kind": corrects.kind.value},
    }


def event_from_record(record: dict[str, Any]) -> UsageEvent:
    """The event in a decoded `usage-event` record. Its rules are not yet checked: see `check_event`."""
    event = UsageEvent._make(record.values())  # the decoder keeps the schema's order, which is the event's
    corrects = record["corrects"]
    if corrects is None:
        return event
    return event._replace(corrects=Correction(**corrects | {"kind": CorrectionKind(corrects["kind"])}))


def snapshot_to_record(snapshot: WindowSnapshot) -> dict[str, Any]:
    """A `usage-window` record."""
    ref = snapshot.ref
    return {
        "window_id": ref.window_id,
        "client_id": ref.client_id,
        "window_start": ref.start,
        "window_end": ref.end,
        "topic_id": ref.topic_id,
        "source_partition": ref.partition,
        "cutoff_offset": snapshot.cutoff_offset,
        "skus": [{"sku": sku, **_sums_to_record(total)} for sku, total in sorted(snapshot.skus.items())],
        "closed_at": snapshot.closed_at,
        "watermark": snapshot.watermark,
    }


def _sums_to_record(sums: SkuTotal) -> dict[str, int]:
    """Its fields by name; `dataclasses.asdict` takes ten times as long, and a window has many SKUs."""
    return {
        "count": sums.count,
        "credits_micro": sums.credits_micro,
        "free_count": sums.free_count,
        "free_credits_micro": sums.free_credits_micro,
    }


def snapshot_from_record(record: dict[str, Any]) -> WindowSnapshot:
    """The snapshot in a decoded `usage-window` record.

    Raises:
        DeadLetterError: it contradicts itself: another window's id, an empty window, a SKU twice.
    """
    ref = WindowRef(
        record["client_id"],
        record["window_start"],
        record["window_end"],
        record["topic_id"],
        record["source_partition"],
    )
    if ref.window_id != record["window_id"]:
        raise DeadLetterError(
            Reason.INVALID_FIELD, f"window_id is {record['window_id']!r}, its fields say {ref.window_id}"
        )
    if ref.end <= ref.start:
        raise DeadLetterError(Reason.INVALID_FIELD, f"window_end {ref.end} is not after {ref.start}")
    skus = {
        row["sku"]: SkuTotal(row["count"], row["credits_micro"], row["free_count"], row["free_credits_micro"])
        for row in record["skus"]
    }
    if len(skus) != len(record["skus"]):
        raise DeadLetterError(Reason.INVALID_FIELD, "a SKU stands in the snapshot twice")
    return WindowSnapshot(ref, record["cutoff_offset"], skus, record["closed_at"], record["watermark"])


def total_to_record(total: UsageTotal) -> dict[str, Any]:
    """A `usage-total` record."""
    return {"topic_id": total.topic_id, "source_partition": total.partition} | {
        "client_id": total.client_id,
        "cutoff_offset": total.cutoff_offset,
        **_sums_to_record(total.sums),
    }


def total_from_record(record: dict[str, Any]) -> UsageTotal:
    """The statement in a decoded `usage-total` record."""
    return UsageTotal(
        record["topic_id"],
        record["source_partition"],
        record["client_id"],
        record["cutoff_offset"],
        SkuTotal(
            record["count"], record["credits_micro"], record["free_count"], record["free_credits_micro"]
        ),
    )


def progress_to_record(progress: UsageProgress) -> dict[str, Any]:
    """A `usage-progress` record."""
    return {
        "topic_id": progress.topic_id,
        "source_partition": progress.partition,
        "accounted_until": progress.accounted_until,
        "published_until": progress.published_until,
    }


def progress_from_record(record: dict[str, Any]) -> UsageProgress:
    """The statement in a decoded `usage-progress` record."""
    return UsageProgress(
        record["topic_id"],
        record["source_partition"],
        record["accounted_until"],
        record["published_until"],
    )


def grant_to_record(grant: CreditGrant) -> dict[str, Any]:
    """A `credit-grant` record."""
    return {
        "grant_id": grant.grant_id,
        "client_id": grant.client_id,
        "kind": grant.kind.value,
        "credits_micro": grant.credits_micro,
        "period_start": grant.period_start,
        "period_end": grant.period_end,
        "base": [
            {
                "topic_id": part.topic_id,
                "source_partition": part.partition,
                "cutoff_offset": part.cutoff_offset,
                "credits_micro": part.credits_micro,
            }
            for part in grant.base
        ],
        "granted_at": grant.granted_at,
        "granted_by": grant.granted_by,
        "reason": grant.reason,
    }


def grant_from_record(record: dict[str, Any]) -> CreditGrant:
    """The grant in a decoded `credit-grant` record.

    Raises:
        DeadLetterError: a field breaks a rule; other programs write this topic, too.
    """
    base = tuple(
        BaselinePart(part["topic_id"], part["source_partition"], part["cutoff_offset"], part["credits_micro"])
        for part in record["base"]
    )
    grant = CreditGrant(**record | {"kind": GrantKind(record["kind"]), "base": base})
    try:
        check_grant(grant)
    except ValueError as error:
        raise DeadLetterError(Reason.INVALID_FIELD, str(error)) from None
    return grant


def alert_to_record(alert: CreditAlert) -> dict[str, Any]:
    """A `credit-alert` record."""
    return asdict(alert)


def alert_from_record(record: dict[str, Any]) -> CreditAlert:
    """The alert in a decoded `credit-alert` record."""
    return CreditAlert(**record)


def total_key(topic_id: str, partition: int, client_id: str) -> bytes:
    """Key of a `usage-total` on `usage.totals` (golden vectors: `schemas/golden`)."""
    return canonical("meterline.total.1", topic_id, partition, client_id)


def is_progress_key(key: bytes) -> bool:
    """Whether a record of `usage.totals` is a `usage-progress`; otherwise it is a `usage-total`."""
    return key.startswith(_PROGRESS_HEAD)


def progress_key(topic_id: str, partition: int) -> bytes:
    """Key of a `usage-progress` on `usage.totals` (golden vectors: `schemas/golden`)."""
    return canonical(_PROGRESS_TAG, topic_id, partition)
