"""Hostile bytes are dead letters and nothing else; honest events survive."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import (
    event_from_record,
    event_to_record,
    snapshot_from_record,
    snapshot_to_record,
    total_to_record,
)
from meterline.contracts.sums_writer import snapshot_to_avro, total_to_avro
from meterline.contracts.versions import schema_names
from meterline.domain.events import Correction, CorrectionKind, UsageEvent
from meterline.domain.reasons import Reason
from meterline.domain.totals import UsageTotal
from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot
from meterline.errors import DeadLetterError

CODECS = {name: RecordCodec(name) for name in schema_names()}
REASONS = {Reason.UNKNOWN_FRAMING, Reason.UNKNOWN_SCHEMA, Reason.UNDECODABLE}
for known in CODECS.values():
    known.register_id(1, 1)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
LONG = st.integers(-(2**63), 2**63 - 1)
INT = st.integers(-(2**31), 2**31 - 1)
CORRECTIONS = st.builds(Correction, TEXT, st.sampled_from(CorrectionKind), TEXT, INT, LONG)
EVENTS = st.builds(
    UsageEvent,
    event_id=TEXT,
    client_id=TEXT,
    correlation_id=TEXT,
    sku=TEXT,
    credits_micro=LONG,
    occurred_at=LONG,
    source=TEXT,
    attributes=st.dictionaries(TEXT, TEXT, max_size=5),
    reservation_id=st.none() | TEXT,
    billable=st.booleans(),
    corrects=st.none() | CORRECTIONS,
)
TOTALS = st.builds(SkuTotal, LONG, LONG, LONG, LONG) | st.builds(SkuTotal, LONG, LONG)
REFS = st.builds(WindowRef, TEXT, st.integers(0, 2**40), st.integers(2**40 + 1, 2**41), TEXT, INT)
SNAPSHOTS = st.builds(
    WindowSnapshot, REFS, LONG, st.dictionaries(TEXT, TOTALS, max_size=5), closed_at=LONG, watermark=LONG
)
HEADS = st.sampled_from([b"", b"\x00", b"\xc3\x01", b"\x00\x00\x00\x00\x01"])


def decode(name, data):
    """A dict, or a dead letter with one of the codec's reasons; anything else fails the test."""
    try:
        outcome = CODECS[name].decode(data)
    except DeadLetterError as refusal:
        outcome = refusal.reason

    assert isinstance(outcome, dict) or outcome in REASONS


@settings(max_examples=500)
@given(st.sampled_from(sorted(CODECS)), HEADS, st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_dead_letter(name, head, body):
    """No input raises anything else: bad input stops nobody."""
    decode(name, head + body)
    decode(name, b"\xc3\x01" + CODECS[name].newest.fingerprint + body)


@settings(max_examples=500)
@given(EVENTS, st.data())
def test_any_damage_to_an_event_is_a_record_or_a_dead_letter(event, data):
    """Nearly right bytes reach deeper into the decoder than random ones."""
    good = CODECS["usage-event"].encode(event_to_record(event))
    position = data.draw(st.integers(0, len(good) - 1))
    patch = data.draw(st.binary(max_size=12))
    decode("usage-event", good[:position] + patch + good[position + data.draw(st.integers(0, 12)) :])


@given(EVENTS)
def test_an_event_survives(event):
    """Written and read, it is the same event."""
    data = CODECS["usage-event"].encode(event_to_record(event))

    assert event == event_from_record(CODECS["usage-event"].decode(data))


@given(SNAPSHOTS)
def test_a_snapshot_survives(snapshot):
    """Written and read, it is the same statement, under the same id."""
    data = CODECS["usage-window"].encode(snapshot_to_record(snapshot))

    assert snapshot == snapshot_from_record(CODECS["usage-window"].decode(data))


@given(SNAPSHOTS)
def test_equal_snapshots_have_equal_bytes(snapshot):
    """The order in which SKUs were seen leaves no trace."""
    turned = WindowSnapshot(
        snapshot.ref,
        snapshot.cutoff_offset,
        dict(reversed(snapshot.skus.items())),
        snapshot.closed_at,
        snapshot.watermark,
    )
    codec = CODECS["usage-window"]

    assert codec.encode(snapshot_to_record(snapshot)) == codec.encode(snapshot_to_record(turned))


@given(SNAPSHOTS)
def test_a_snapshot_is_written_as_its_record_is(snapshot):
    """What metering writes without a record in between are the codec's bytes."""
    codec = CODECS["usage-window"]

    assert codec.encode(snapshot_to_record(snapshot)) == codec.head() + snapshot_to_avro(snapshot)


@given(st.builds(UsageTotal, TEXT, INT, TEXT, LONG, TOTALS))
def test_a_total_is_written_as_its_record_is(total):
    """The same for totals."""
    codec = CODECS["usage-total"]

    assert codec.encode(total_to_record(total)) == codec.head() + total_to_avro(total)


@given(st.binary(max_size=64), st.integers(1, 500))
def test_every_key_has_a_partition(key, partitions):
    """Also the empty one, and those whose hash is negative in Java."""
    assert 0 <= partition_for(key, partitions) < partitions
