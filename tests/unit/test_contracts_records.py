"""Records say what the domain means, and a record that contradicts itself is refused."""

from __future__ import annotations

import pytest

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import (
    event_from_record,
    event_to_record,
    progress_key,
    snapshot_from_record,
    snapshot_to_record,
    total_key,
)
from meterline.domain.events import Correction, CorrectionKind, UsageEvent
from meterline.domain.reasons import Reason
from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot
from meterline.errors import DeadLetterError

EVENT = UsageEvent("e", "acme", "t", "gpu", -5, 7, corrects=Correction("e0", CorrectionKind.VOID, "x", 3, 17))
SNAPSHOT = WindowSnapshot(
    WindowRef("acme", 0, 1_000, "topic", 3), 17, {"b": SkuTotal(1, 2, 3, 4), "a": SkuTotal()}, 5, 6
)


def test_the_fields_of_an_event_are_the_schemas_in_its_order():
    """One more field in only one of the two would be lost without a word."""
    schema = RecordCodec("usage-event").newest.source

    assert (
        [field["name"] for field in schema["fields"]]
        == list(UsageEvent._fields)
        == list(event_to_record(EVENT))
    )
    assert list(Correction._fields) == [field["name"] for field in schema["fields"][-1]["type"][1]["fields"]]


def test_a_correction_is_read_back_with_its_kind_as_an_enum():
    """Rules compare kinds, not strings."""
    event = event_from_record(event_to_record(EVENT))

    assert event == EVENT
    assert event.corrects is not None
    assert event.corrects.kind is CorrectionKind.VOID


def test_skus_are_written_in_ascending_order():
    """The same statement is the same bytes."""
    assert [row["sku"] for row in snapshot_to_record(SNAPSHOT)["skus"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"window_id": "0" * 32}, "window_id is"),
        ({"client_id": "other"}, "window_id is"),
        ({"source_partition": 4}, "window_id is"),
    ],
)
def test_a_snapshot_under_another_windows_id_is_refused(change, detail):
    """Billing would value it under the wrong window."""
    with pytest.raises(DeadLetterError, match=detail) as refused:
        snapshot_from_record(snapshot_to_record(SNAPSHOT) | change)

    assert refused.value.reason == Reason.INVALID_FIELD


def test_an_empty_window_and_a_sku_twice_are_refused():
    """Neither can be the truth about a log."""
    empty = WindowSnapshot(WindowRef("acme", 5, 5, "topic", 3), 17, {}, 5, 6)
    with pytest.raises(DeadLetterError, match="not after"):
        snapshot_from_record(snapshot_to_record(empty))

    record = snapshot_to_record(SNAPSHOT)
    record["skus"].append(record["skus"][0])
    with pytest.raises(DeadLetterError, match="twice"):
        snapshot_from_record(record)


def test_keys_of_totals_and_progress_never_collide():
    """They share a compacted topic: an equal key would delete the other."""
    keys = {
        total_key("t", 1, "11:x"),
        total_key("t", 11, "x"),
        total_key("t1", 1, "x"),
        total_key("t", 1, ""),
        progress_key("t", 1),
        progress_key("t", 11),
    }

    assert len(keys) == 6
