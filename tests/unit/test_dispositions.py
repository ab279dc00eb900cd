"""Every row of docs/dispositions.md, through the real codec and the meter."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_from_record, event_to_record
from meterline.domain.credits import CREDITS_MICRO_MAX
from meterline.domain.events import ATTRIBUTE_VALUE_BYTES_MAX, Correction, CorrectionKind, UsageEvent
from meterline.domain.reasons import Reason
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SKUS_PER_WINDOW_MAX, SkuTotal
from meterline.metering.meter import Meter
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SliceFiles
from meterline.metering.state import Counters, Meta
from meterline.settings import MeteringSettings

TABLE = Path(__file__).parents[2] / "docs" / "dispositions.md"
HOUR, DAY = 3_600_000, 86_400_000
NOW = 20_000 * DAY + 30 * 60_000
WINDOW = NOW // HOUR * HOUR
CODEC = RecordCodec("usage-event")
EVENT = UsageEvent("e1", "acme", "task", "gpu", 5, NOW)
VOID = Correction("e1", CorrectionKind.VOID, "topic", 0, 0)
INT64_MAX = 2**63 - 1


class Record(NamedTuple):
    offset: int
    timestamp: int
    value: bytes | None
    key: bytes | None = None


def encoded(event=EVENT, **changes):
    return CODEC.encode(event_to_record(event._replace(**changes)))


def confluent(schema_id):
    return b"\x00" + schema_id.to_bytes(4, "big") + encoded()[10:]


def meter():
    meta = Meta("cluster", "topic", -1, 0, 0, WindowLengths.of(HOUR), Counters())
    return Meter(
        0,
        MeteringSettings(),
        lambda value: event_from_record(CODEC.decode(value)),
        meta,
        SlicedIndex(SliceFiles.of(MeteringSettings())),
    )


def window_at(total):
    """A meter whose window of now already adds up to this."""
    ready = meter()
    ready._window(WINDOW, "acme").skus["gpu"] = SkuTotal(1, total)
    return ready


def lifetime_at(total):
    ready = meter()
    ready.adopt_totals({"acme": SkuTotal(1, total)})
    return ready


def full_window():
    ready = meter()
    ready._window(WINDOW, "acme").skus.update({f"s{n}": SkuTotal(1, 1) for n in range(SKUS_PER_WINDOW_MAX)})
    return ready


class Case(NamedTuple):
    """The last of the records is the one the row is about."""

    values: tuple
    disposition: str
    reason: str = ""
    meter: object = meter


CASES = {
    "valid": Case((encoded(),), "ledger"),
    "valid, not billable": Case((encoded(billable=False),), "ledger"),
    "zero credits": Case((encoded(credits_micro=0),), "ledger"),
    "Confluent framing, known id": Case((confluent(7),), "ledger"),
    "duplicate": Case((encoded(), encoded()), "duplicate"),
    "retried with another time": Case((encoded(), encoded(occurred_at=NOW - 2 * HOUR)), "duplicate"),
    "retried with other attributes": Case(
        (encoded(), encoded(attributes={"a": "b"}, source="x")), "duplicate"
    ),
    "same id of another client": Case((encoded(), encoded(client_id="other")), "ledger"),
    "conflict": Case((encoded(), encoded(credits_micro=6)), "dead letter", Reason.CONFLICT),
    "late": Case((encoded(event_id="e0"), encoded(occurred_at=NOW - 3 * HOUR)), "ledger"),
    "up to five minutes ahead": Case((encoded(occurred_at=NOW + 300_000),), "ledger"),
    "more than five minutes ahead": Case(
        (encoded(occurred_at=NOW + 300_001),), "dead letter", Reason.TIME_IN_FUTURE
    ),
    "from 2030": Case((encoded(occurred_at=1_900_000_000_000),), "dead letter", Reason.TIME_IN_FUTURE),
    "from last year": Case((encoded(occurred_at=NOW - 365 * DAY),), "ledger"),
    "before 1970": Case((encoded(occurred_at=-1),), "dead letter", Reason.INVALID_FIELD),
    "negative": Case((encoded(credits_micro=-1),), "dead letter", Reason.NEGATIVE_CREDITS),
    "negative correction": Case((encoded(credits_micro=-5, corrects=VOID),), "ledger"),
    "largest amount of one event": Case((encoded(credits_micro=CREDITS_MICRO_MAX),), "ledger"),
    "more than one event may cost": Case(
        (encoded(credits_micro=CREDITS_MICRO_MAX + 1),), "dead letter", Reason.CREDITS_OUT_OF_RANGE
    ),
    "credits at the int64 edge": Case(
        (encoded(credits_micro=INT64_MAX),), "dead letter", Reason.CREDITS_OUT_OF_RANGE
    ),
    "window total reaches the int64 edge": Case((encoded(),), "ledger", "", lambda: window_at(INT64_MAX - 5)),
    "window total beyond the int64 edge": Case(
        (encoded(),), "dead letter", Reason.WINDOW_TOTAL_OUT_OF_RANGE, lambda: window_at(INT64_MAX - 4)
    ),
    "lifetime total beyond the int64 edge": Case(
        (encoded(),), "dead letter", Reason.LIFETIME_TOTAL_OUT_OF_RANGE, lambda: lifetime_at(INT64_MAX - 4)
    ),
    "too many SKUs": Case((encoded(),), "dead letter", Reason.TOO_MANY_SKUS, full_window),
    "one more event in a full window's SKU": Case((encoded(sku="s0"),), "ledger", "", full_window),
    "empty client": Case((encoded(client_id=""),), "dead letter", Reason.INVALID_FIELD),
    "id too long": Case((encoded(event_id="x" * 201),), "dead letter", Reason.INVALID_FIELD),
    "attribute too large": Case(
        (encoded(attributes={"a": "x" * (ATTRIBUTE_VALUE_BYTES_MAX + 1)}),),
        "dead letter",
        Reason.INVALID_FIELD,
    ),
    "truncated": Case((encoded()[:-1],), "dead letter", Reason.UNDECODABLE),
    "bytes behind the event": Case((encoded() + b"\x00",), "dead letter", Reason.UNDECODABLE),
    "head only": Case((encoded()[:5],), "dead letter", Reason.UNDECODABLE),
    "unknown fingerprint": Case(
        (b"\xc3\x01" + bytes(8) + encoded()[10:],), "dead letter", Reason.UNKNOWN_SCHEMA
    ),
    "unknown Confluent id": Case((confluent(8),), "dead letter", Reason.UNKNOWN_SCHEMA),
    "wrong framing": Case((b'{"event_id": "e1"}',), "dead letter", Reason.UNKNOWN_FRAMING),
    "empty value": Case((b"",), "dead letter", Reason.UNKNOWN_FRAMING),
    "no value (tombstone)": Case((None,), "dead letter", Reason.UNKNOWN_FRAMING),
}


@pytest.fixture(autouse=True)
def known_schema_id():
    CODEC.register_id(7, 1)


def take(ready, values):
    """Of the windows that have ended the ledger holds nothing."""
    ready.take(Record(offset, NOW + offset, value) for offset, value in enumerate(values))
    for ref in ready.windows_lacking_past():
        ready.add_past(ref, {})


def flush_of(case):
    ready = case.meter()
    take(ready, case.values)
    return ready.build_flush(NOW)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_record_has_one_documented_end(case):
    """Ledger, duplicate or dead letter with this reason, and never two of them."""
    flush = flush_of(case)

    last = len(case.values) - 1
    ends = [("ledger", "", offset) for offset in (flush.rows[2] if flush.rows else [])]
    ends += [("dead letter", dead.reason, dead.record.offset) for dead in flush.dead_letters]
    ends += [("duplicate", "", last)] * flush.duplicates
    assert sorted(end[2] for end in ends) == list(range(len(case.values)))
    assert (case.disposition, case.reason, last) == next(end for end in ends if end[2] == last)
    assert all(dead.detail for dead in flush.dead_letters)
    assert all(dead.record.value == case.values[last] for dead in flush.dead_letters), "original bytes"


@pytest.mark.parametrize("age", [3 * HOUR, 365 * DAY], ids=["late", "from last year"])
def test_what_is_late_counts_in_its_own_window(age):
    """However old: the client used it then."""
    ready = meter()
    take(ready, (encoded(event_id="e0"), encoded(occurred_at=NOW - age)))

    (snapshot,) = ready.build_flush(NOW).snapshots

    assert (WINDOW - age, 1, {"gpu": SkuTotal(1, 5)}) == (
        snapshot.ref.start,
        snapshot.cutoff_offset,
        snapshot.skus,
    )


def test_a_refused_record_moves_neither_watermark_nor_windows():
    """Bad input stops nobody, and closes nothing."""
    for case in CASES.values():
        if case.disposition == "dead letter" and len(case.values) == 1:
            ready = case.meter()
            before = deepcopy(ready.kept_windows())
            ready.take([Record(0, NOW, case.values[0])])

            assert (0, before) == (ready.watermark, ready.kept_windows())


def documented():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \|", TABLE.read_text(), re.MULTILINE)
    return {
        name.strip(): (end.strip(), reason.strip().strip("`"))
        for name, end, reason in rows
        if name.strip() != "input" and not name.startswith("-")
    }


def test_every_row_of_the_table_is_tested_and_every_test_is_a_row():
    """The page is what the code does, to the last row."""
    assert {name: (case.disposition, str(case.reason)) for name, case in CASES.items()} == documented()


def test_every_reason_is_documented():
    """A code that nobody can look up helps nobody."""
    assert set(Reason) == {reason for _, reason in documented().values() if reason}
