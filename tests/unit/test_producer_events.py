"""What `publish` accepts, refuses and names an event."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from meterline.domain.events import FUTURE_MAX_MS, default_event_id
from meterline.producer.errors import InvalidUsage
from meterline.producer.events import build_event

NOW_MS = 1_764_000_000_000
TASK = {"client_id": "acme", "correlation_id": "task-1", "sku": "gpu-second", "credits": "17.25"}


def build(**change):
    return build_event(**TASK | change, now_ms=NOW_MS)


def test_the_same_task_has_the_same_id_in_every_process():
    """The id is a function of client, correlation id, SKU and item: a task run again is billed once."""
    assert default_event_id("acme", "task-1", "gpu-second", 0) == build().event_id
    assert build(credits=1, source="other", attributes={"a": "b"}).event_id == build().event_id


@pytest.mark.parametrize(
    "change", [{"client_id": "b"}, {"correlation_id": "b"}, {"sku": "b"}, {"item": 1}, {"event_id": "own"}]
)
def test_each_part_of_the_identity_tells_events_apart(change):
    """Two charges never share an id by accident."""
    assert build().event_id != build(**change).event_id


@pytest.mark.parametrize(
    ("credits_given", "micro"),
    [("17.25", 17_250_000), (Decimal("0.000001"), 1), (3, 3_000_000), (0, 0), ("1E3", 1_000_000_000)],
)
def test_credits_are_exact(credits_given, micro):
    """Credits are given as people write them and kept as micro-credits."""
    assert micro == build(credits=credits_given).credits_micro


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"credits": 1.5}, "not float"),
        ({"credits": True}, "not bool"),
        ({"credits": "0.0000001"}, "finer than a micro-credit"),
        ({"credits": "1,5"}, "not a decimal number"),
        ({"credits": "-1"}, "publish a correction"),
        ({"credits": "1000000001"}, "more than 1000000000"),
        ({"client_id": ""}, "client_id is empty"),
        ({"client_id": 7}, "client_id must be a string, not int"),
        ({"correlation_id": None}, "correlation_id must be a string, not NoneType"),
        ({"sku": "\udcff"}, "not valid Unicode"),
        ({"sku": "s" * 201}, "sku is longer than 200 bytes"),
        ({"event_id": "\udcff"}, "not valid Unicode"),
        ({"event_id": "own", "item": 1}, "not both"),
        ({"reservation_id": 1}, "reservation_id must be a string"),
        ({"item": -1}, "not -1"),
        ({"item": True}, "not True"),
        ({"item": "1"}, "not '1'"),
        ({"item": 10**5_000}, "not a larger one"),
        ({"billable": "yes"}, "billable must be True or False"),
        ({"attributes": ["a"]}, "attributes must map strings to strings"),
        ({"attributes": {"gpus": 8}}, "convert it first"),
        ({"attributes": {"a": "\udcff"}}, "not valid Unicode"),
        ({"attributes": {"a": "v" * 4_097}}, "attribute 'a' is too long"),
        ({"attributes": {str(n): "" for n in range(65)}}, "more than 64 attributes"),
        ({"occurred_at": datetime(2025, 11, 24, 10)}, "has no time zone"),  # noqa: DTZ001 - what is refused
        ({"occurred_at": "2025-11-24"}, "must be a datetime"),
        ({"occurred_at": datetime(1969, 12, 31, tzinfo=UTC)}, "before 1970"),
        ({"occurred_at": datetime(2030, 1, 1, tzinfo=UTC)}, "Check this machine's clock"),
    ],
)
def test_what_metering_would_refuse_never_leaves(change, why):
    """A dead letter is found out by the worker that made it, with what to do, not by an operator later."""
    with pytest.raises(InvalidUsage, match=why):
        build(**change)


def test_the_event_happened_when_the_caller_says_in_any_time_zone():
    """Times are milliseconds in UTC; what is finer is cut off."""
    moment = datetime(2025, 11, 24, 12, 0, 0, 1_999, tzinfo=timezone(timedelta(hours=2)))

    assert build(occurred_at=moment).occurred_at == 1_763_978_400_001


def test_without_a_time_the_event_happened_now():
    """The default of `occurred_at` is the moment of publishing."""
    assert build().occurred_at == NOW_MS


def test_a_clock_that_is_a_little_ahead_is_no_mistake():
    """The future begins where metering begins to refuse it."""
    moment = datetime.fromtimestamp((NOW_MS + FUTURE_MAX_MS) / 1000, UTC)

    assert build(occurred_at=moment).occurred_at == NOW_MS + FUTURE_MAX_MS


def test_the_callers_mapping_stays_the_callers():
    """What the caller changes after publishing doesn't reach the event."""
    attributes = {"model": "a"}
    event = build(attributes=attributes)
    attributes["model"] = "b"

    assert event.attributes == {"model": "a"}
