"""What a usage event must be, one test per rule and reason code."""

from __future__ import annotations

import pytest

from meterline.domain.credits import CREDITS_MICRO_MAX
from meterline.domain.events import (
    ATTRIBUTE_KEY_BYTES_MAX,
    ATTRIBUTE_VALUE_BYTES_MAX,
    ATTRIBUTES_MAX,
    FUTURE_MAX_MS,
    ID_BYTES_MAX,
    Correction,
    CorrectionKind,
    UsageEvent,
    check_event,
    default_event_id,
    identity_hash,
    payload_digest,
)
from meterline.domain.reasons import Reason
from meterline.errors import DeadLetterError

APPENDED_AT = 1_764_000_000_000
EVENT = UsageEvent("e1", "acme", "task-1", "gpu-seconds", 5, APPENDED_AT)
CORRECTION = Correction("e0", CorrectionKind.AMEND, "topic", 3, 17)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"credits_micro": 0},
        {"credits_micro": CREDITS_MICRO_MAX},
        {"credits_micro": -CREDITS_MICRO_MAX, "corrects": CORRECTION},
        {"occurred_at": APPENDED_AT + FUTURE_MAX_MS},
        {"occurred_at": 0},
        {"client_id": "c" * ID_BYTES_MAX},
        {"sku": "ü" * (ID_BYTES_MAX // 2)},
        {"source": "s" * ID_BYTES_MAX, "reservation_id": "r" * ID_BYTES_MAX},
        {"attributes": {f"k{n}": "v" for n in range(ATTRIBUTES_MAX)}},
        {"attributes": {"k" * ATTRIBUTE_KEY_BYTES_MAX: "v" * ATTRIBUTE_VALUE_BYTES_MAX}},
    ],
)
def test_an_event_at_each_limit_is_accepted(change):
    """Limits are inclusive."""
    check_event(EVENT._replace(**change), APPENDED_AT)


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"client_id": ""}, Reason.INVALID_FIELD, "client_id is empty"),
        ({"event_id": ""}, Reason.INVALID_FIELD, "event_id is empty"),
        ({"correlation_id": ""}, Reason.INVALID_FIELD, "correlation_id is empty"),
        ({"sku": ""}, Reason.INVALID_FIELD, "sku is empty"),
        ({"client_id": "c" * 201}, Reason.INVALID_FIELD, "client_id is longer"),
        ({"event_id": "ü" * 101}, Reason.INVALID_FIELD, "event_id is longer"),
        ({"correlation_id": "c" * 201}, Reason.INVALID_FIELD, "correlation_id is longer"),
        ({"sku": "𝄞" * 51}, Reason.INVALID_FIELD, "sku is longer"),
        ({"source": "s" * 201}, Reason.INVALID_FIELD, "source is longer"),
        ({"reservation_id": "r" * 201}, Reason.INVALID_FIELD, "reservation_id is longer"),
        ({"attributes": {str(n): "" for n in range(65)}}, Reason.INVALID_FIELD, "more than 64 attributes"),
        ({"attributes": {"k" * 201: ""}}, Reason.INVALID_FIELD, "is too long"),
        ({"attributes": {"k": "ü" * 2_049}}, Reason.INVALID_FIELD, "is too long"),
        ({"occurred_at": -1}, Reason.INVALID_FIELD, "before 1970"),
        ({"credits_micro": -1}, Reason.NEGATIVE_CREDITS, "only an event with `corrects`"),
        ({"credits_micro": CREDITS_MICRO_MAX + 1}, Reason.CREDITS_OUT_OF_RANGE, "beyond the limit"),
        (
            {"credits_micro": -CREDITS_MICRO_MAX - 1, "corrects": CORRECTION},
            Reason.CREDITS_OUT_OF_RANGE,
            "beyond the limit",
        ),
        ({"occurred_at": APPENDED_AT + FUTURE_MAX_MS + 1}, Reason.TIME_IN_FUTURE, "300001 ms ahead"),
    ],
)
def test_an_event_beyond_a_limit_is_refused_with_its_reason(change, reason, detail):
    """The reason is a code of the contract, the detail is for a person."""
    with pytest.raises(DeadLetterError, match=detail) as refusal:
        check_event(EVENT._replace(**change), APPENDED_AT)

    assert reason == refusal.value.reason


@pytest.mark.parametrize(
    "change",
    [
        {"occurred_at": 1},
        {"source": "another"},
        {"attributes": {"a": "b"}},
        {"event_id": "other"},
        {"correlation_id": "other"},
        {"reservation_id": "other"},
    ],
)
def test_a_retried_task_may_report_time_source_and_attributes_anew(change):
    """They are no part of the payload: the copy is a duplicate, not a conflict."""
    assert payload_digest(EVENT) == payload_digest(EVENT._replace(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"client_id": "acm"},
        {"sku": "gpu"},
        {"credits_micro": 6},
        {"billable": False},
        {"corrects": CORRECTION},
        {"corrects": CORRECTION._replace(event_id="e9")},
        {"corrects": CORRECTION._replace(kind=CorrectionKind.VOID)},
        {"corrects": CORRECTION._replace(topic_id="x")},
        {"corrects": CORRECTION._replace(partition=4)},
        {"corrects": CORRECTION._replace(offset=18)},
    ],
)
def test_what_a_client_pays_for_is_the_payload(change):
    """A copy that differs in any of it is a conflict."""
    other = EVENT._replace(**change)
    base = EVENT._replace(corrects=CORRECTION) if other.corrects not in {None, CORRECTION} else EVENT

    assert payload_digest(base) != payload_digest(other)


def test_no_two_tasks_share_an_id_by_moving_a_character():
    """Fields are length-prefixed: their borders are part of what is hashed."""
    assert default_event_id("ab", "c", "s") != default_event_id("a", "bc", "s")
    assert identity_hash("ab", "c") != identity_hash("a", "bc")


def test_items_of_one_task_are_told_apart():
    """A task that charges one SKU twice says so; the same charge again has the same id."""
    assert default_event_id("a", "t", "s") == default_event_id("a", "t", "s", 0)
    assert default_event_id("a", "t", "s", 1) != default_event_id("a", "t", "s", 0)
