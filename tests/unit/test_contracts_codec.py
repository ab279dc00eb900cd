"""Both framings, every version, and a reason for everything that is refused."""

from __future__ import annotations

import io
import json

import avro.io
import avro.schema
import pytest
from fastavro import parse_schema

from meterline.contracts import codec as codec_module
from meterline.contracts.avro_json import record_from_json
from meterline.contracts.codec import RecordCodec
from meterline.contracts.files import schemas_dir
from meterline.contracts.records import event_to_record
from meterline.contracts.versions import fingerprint_of, load_versions, schema_names
from meterline.domain.events import UsageEvent
from meterline.domain.reasons import Reason
from meterline.errors import DeadLetterError, UserError

RECORD = event_to_record(UsageEvent("e1", "acme", "task-1", "gpu", 17_250_000, 1_764_000_000_000))
EXAMPLES = sorted(schemas_dir().glob("*/examples/*.json"))


@pytest.fixture
def codec():
    return RecordCodec("usage-event")


def refusal(codec, data):
    with pytest.raises(DeadLetterError) as refused:
        codec.decode(data)
    return refused.value


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.parent.name}/{path.stem}")
def test_every_example_survives_being_written_and_read(path):
    """Whatever a schema can say, the codec keeps."""
    codec = RecordCodec(path.parent.parent.name)
    record = record_from_json(codec.newest.parsed, json.loads(path.read_text("utf-8")))

    assert record == codec.decode(codec.encode(record))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.parent.name}/{path.stem}")
def test_another_avro_implementation_reads_the_same(path):
    """The bytes are Avro, not fastavro's own idea of it."""
    codec = RecordCodec(path.parent.parent.name)
    record = record_from_json(codec.newest.parsed, json.loads(path.read_text("utf-8")))
    schema = avro.schema.make_avsc_object(codec.newest.parsed)
    stream = io.BytesIO(codec.encode(record)[10:])

    assert record == avro.io.DatumReader(schema).read(avro.io.BinaryDecoder(stream))


def test_the_fingerprint_is_the_specifications():
    """CRC-64-AVRO of `"int"` is 0x7275d51a3f395c8f in Avro's own test data; little-endian in the head."""
    assert int.from_bytes(fingerprint_of("int"), "little") == 0x7275D51A3F395C8F


def test_no_two_schemas_share_a_fingerprint():
    """The head says which record follows."""
    fingerprints = [version.fingerprint for name in schema_names() for version in load_versions(name)]

    assert len(fingerprints) == len(set(fingerprints))


def test_both_framings_are_read(codec):
    """A Confluent id is only another name of a version."""
    single = codec.encode(RECORD)
    codec.register_id(258, 1)

    assert codec.decode(single) == codec.decode(b"\x00\x00\x00\x01\x02" + single[10:]) == RECORD


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, Reason.UNKNOWN_FRAMING),
        (b"", Reason.UNKNOWN_FRAMING),
        (b'{"client_id": "acme"}', Reason.UNKNOWN_FRAMING),
        (b"\xc3\x02" + bytes(20), Reason.UNKNOWN_FRAMING),
        (b"\xc3\x01" + bytes(20), Reason.UNKNOWN_SCHEMA),
        (b"\x00\x00\x00\x00\x07" + bytes(20), Reason.UNKNOWN_SCHEMA),
        (b"\xc3\x01\x00", Reason.UNDECODABLE),
        (b"\x00\x00", Reason.UNDECODABLE),
    ],
)
def test_a_head_that_says_nothing_known_is_refused(codec, data, reason):
    """Framing first, then schema."""
    assert reason == refusal(codec, data).reason


def test_another_records_bytes_are_an_unknown_schema(codec):
    """A window on the topic of events is no event."""
    assert refusal(RecordCodec("client"), codec.encode(RECORD)).reason == Reason.UNKNOWN_SCHEMA


def test_every_truncation_and_every_trailing_byte_is_refused(codec):
    """A record is all of its bytes and no others."""
    data = codec.encode(RECORD)

    assert {refusal(codec, data[:end]).reason for end in range(10, len(data))} == {Reason.UNDECODABLE}
    assert refusal(codec, data + b"\x00").reason == Reason.UNDECODABLE
    # The same bytes are the same dead letter, after a crash as well: no address of anything in memory.
    assert not [end for end in range(10, len(data)) if " at 0x" in refusal(codec, data[:end]).detail]


def test_a_details_length_is_bounded(codec, monkeypatch):
    """A dead letter's detail must not grow with the poison."""

    def fail(*_):
        raise RuntimeError("x" * 100_000)

    monkeypatch.setattr(codec_module, "schemaless_reader", fail)

    assert len(refusal(codec, codec.encode(RECORD)).detail) <= 300


@pytest.mark.parametrize(
    "change",
    [
        {"credits_micro": 1.5},
        {"credits_micro": True},
        {"credits_micro": "5"},
        {"credits_micro": 2**63},
        {"credits_micro": None},
        {"occurred_at": 1.0},
        {"billable": 1},
        {"client_id": b"acme"},
        {"client_id": "\ud800"},
        {"attributes": {"a": 1}},
        {"corrects": {"event_id": "e"}},
        {"tip": 5},
    ],
)
def test_what_does_not_fit_exactly_is_not_written(codec, change):
    """fastavro alone would write 1.5 credits as 1: never truncate, never drop a field."""
    with pytest.raises(ValueError, match="no usage-event record"):
        codec.encode(RECORD | change)


def test_an_older_version_is_read_into_the_newest(codec, monkeypatch):
    """Old bytes stay readable; a field they don't have gets its default."""
    (v1,) = load_versions("usage-event")
    source = json.loads(json.dumps(v1.source))
    source["fields"].append({"name": "tier", "type": "string", "default": "standard", "doc": "New."})
    parsed = parse_schema(source)
    v2 = type(v1)(v1.name, 2, source, parsed, fingerprint_of(source))
    monkeypatch.setattr(codec_module, "load_versions", lambda _: [v1, v2])

    newer = RecordCodec("usage-event")

    assert newer.decode(codec.encode(RECORD)) == RECORD | {"tier": "standard"}
    assert newer.encode(RECORD | {"tier": "gold"})[:10] == b"\xc3\x01" + v2.fingerprint


def test_an_unknown_name_is_a_users_mistake():
    """The message says what is expected where."""
    with pytest.raises(UserError, match=r"no schema named 'usage-evnt'.*v1\.avsc"):
        RecordCodec("usage-evnt")
