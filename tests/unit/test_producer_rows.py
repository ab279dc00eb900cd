"""The event in one row of a usage file."""

from __future__ import annotations

from decimal import Decimal

import pytest

from meterline.domain.events import default_event_id
from meterline.errors import UserError
from meterline.producer.rows import event_of_row

NOW_MS = 1_764_000_000_000
ROW = {"client_id": "acme", "correlation_id": "t1", "sku": "gpu", "credits": "1.5"}


def event(**change):
    return event_of_row(ROW | change, NOW_MS)


def test_credits_are_decimal_credits_not_micro_credits():
    """A file says 1.5, as people do; the event says 1,500,000."""
    assert event().credits_micro == 1_500_000
    assert event(credits=Decimal("1.5")).credits_micro == 1_500_000


def test_an_empty_optional_cell_is_the_default():
    """CSV has no null."""
    empty = dict.fromkeys(
        ("item", "occurred_at", "event_id", "source", "reservation_id", "billable", "attributes"), ""
    )

    assert event() == event(**empty, **{"attributes.model": ""})


def test_every_column_reaches_the_event():
    """No column is taken and thrown away."""
    full = event(
        item="3",
        occurred_at="2025-11-24T10:00:00+02:00",
        source="worker-7",
        reservation_id="r1",
        billable="FALSE",
        attributes='{"region": "eu"}',
        **{"attributes.model": "large"},
    )

    assert default_event_id("acme", "t1", "gpu", 3) == full.event_id
    assert full.occurred_at == 1_763_971_200_000
    assert (full.source, full.reservation_id, full.billable) == ("worker-7", "r1", False)
    assert full.attributes == {"region": "eu", "model": "large"}
    assert event(event_id="own").event_id == "own"


@pytest.mark.parametrize("value", ["1763971200000", 1_763_971_200_000, "2025-11-24T08:00:00Z"])
def test_a_time_is_iso_8601_or_epoch_milliseconds(value):
    """Both are what exports write."""
    assert event(occurred_at=value).occurred_at == 1_763_971_200_000


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"credits": ""}, "credits is empty"),
        ({"client_id": None}, "client_id is empty"),
        ({"credits": "1,5"}, "not a decimal number"),
        ({"credits": 1.5}, "not float"),
        ({"item": "-1"}, "item must be"),
        ({"item": "1.0"}, "item must be"),
        ({"item": Decimal(1)}, "item must be"),
        ({"item": "9" * 5_000}, "item must be"),
        ({"billable": "yes"}, "billable must be True or False"),
        ({"billable": 1}, "billable must be True or False"),
        ({"occurred_at": "yesterday"}, "neither ISO 8601"),
        ({"occurred_at": "2025-11-24T10:00:00"}, "has no time zone"),
        ({"occurred_at": "1763971200"}, "is it in seconds"),
        ({"occurred_at": "9" * 19}, "after the year 9999"),
        ({"occurred_at": "9" * 5_000}, "neither ISO 8601"),
        ({"occurred_at": True}, "must be an ISO 8601 text"),
        ({"occurred_at": Decimal("1763971200000.5")}, "must be an ISO 8601 text"),
        ({"attributes": "model=large"}, "attributes is not a JSON object"),
        ({"attributes": "[]"}, "attributes is not a JSON object"),
        ({"attributes": {"gpus": 8}}, "must be a string"),
        ({"attributes": {"a": "1"}, "attributes.a": "2"}, "the attribute 'a' is given twice"),
        ({"amount": "1"}, "unknown column 'amount'"),
    ],
)
def test_a_wrong_value_says_what_is_wrong(change, why):
    """Every refusal is of the family that a file's reader turns into a bad row."""
    with pytest.raises(UserError, match=why):
        event(**change)


def test_a_missing_column_of_a_json_line_is_named():
    """Each JSON line has its own columns."""
    with pytest.raises(UserError, match="missing column 'credits'"):
        event_of_row({name: value for name, value in ROW.items() if name != "credits"}, NOW_MS)


def test_the_row_given_is_not_changed():
    """Its reader may read it again."""
    attributes = {"region": "eu"}
    event(attributes=attributes, **{"attributes.model": "large"})

    assert attributes == {"region": "eu"}
