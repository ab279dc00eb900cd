"""What was answered with 200 and rejected afterwards: reports of it, one for each meter and ten seconds.

A report names the idempotency keys of some of the rejected requests, not of all, and never their identifiers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby

from meterline.local.sandbox.moments import rfc3339
from meterline.local.sandbox.state import REPORT_WINDOW_S, Change, JsonObject, State

__all__ = ["ERROR_REPORT", "NO_METER_FOUND", "report", "reported_at"]

ERROR_REPORT = "v1.billing.meter.error_report_triggered"
NO_METER_FOUND = "v1.billing.meter.no_meter_found"


def reported_at(state: State, rejection: Change) -> int:
    """When a rejection is reported: at the end of its ten seconds, or as much later as the rules say."""
    received_at: int = rejection["object"]["created"]
    return received_at // REPORT_WINDOW_S * REPORT_WINDOW_S + REPORT_WINDOW_S + state.rules.report_delay_s


def report(state: State, meter_id: str, window_start: int, now: int) -> tuple[Change, ...]:
    """The report of a meter's rejections of ten seconds; nothing where it was made already.

    Args:
        meter_id: "" for events that no meter was found for.
    """
    rejections = state.unreported.get((meter_id, window_start))
    if not rejections:
        return ()
    event = {
        "id": f"evt_{hashlib.sha256(f'{meter_id} {window_start}'.encode()).hexdigest()[:24]}",
        "object": "v2.core.event",
        "context": None,
        "created": rfc3339(now),
        "data": _data(rejections, window_start, state.rules.report_samples_max),
        "livemode": False,
        "reason": None,
        "type": ERROR_REPORT if meter_id else NO_METER_FOUND,
    }
    if meter_id:
        url = f"/v1/billing/meters/{meter_id}"
        event["related_object"] = {"id": meter_id, "type": "billing.meter", "url": url}
    return (
        {"kind": "event", "object": event, "at": now},
        {"kind": "reported", "meter": meter_id, "window": window_start},
    )


def _data(rejections: Sequence[Change], window_start: int, samples_max: int) -> JsonObject:
    count = len(rejections)
    by_code = groupby(sorted(rejections, key=_code), key=_code)
    return {
        "developer_message_summary": f"There {'is' if count == 1 else 'are'} {count} invalid event"
        f"{'' if count == 1 else 's'}",
        "reason": {
            "error_count": count,
            "error_types": [_error_type(code, list(group), samples_max) for code, group in by_code],
        },
        "validation_end": rfc3339(window_start + REPORT_WINDOW_S),
        "validation_start": rfc3339(window_start),
    }


def _error_type(code: str, rejections: Sequence[Change], samples_max: int) -> JsonObject:
    samples = [
        {"error_message": one["message"], "request": {"identifier": one["idempotency_key"]}}
        for one in rejections[:samples_max]
    ]
    return {"code": code, "error_count": len(rejections), "sample_errors": samples}


def _code(rejection: Change) -> str:
    code: str = rejection["code"]
    return code
