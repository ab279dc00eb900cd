"""Golden vectors: inputs and the exact outputs that every program and every later version must reproduce.

`schemas/golden/<name>.json` is `{"doc": "...", "vectors": [{"input": {...}, "output": "..."}]}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from meterline.contracts.avro_json import record_from_json, record_to_json
from meterline.contracts.codec import CONFLUENT, SINGLE_OBJECT_HEAD_BYTES, RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import event_from_record, progress_key, total_key
from meterline.domain.events import default_event_id, identity_hash, payload_digest
from meterline.domain.twins import twin_correction_id
from meterline.domain.usage_records import usage_record_identifier
from meterline.domain.windows import WindowRef

__all__ = ["GOLDEN", "broken_vectors"]


def _payload_digest(data: dict[str, Any]) -> str:
    return f"{payload_digest(event_from_record(_event(RecordCodec('usage-event'), data))):016x}"


def _single_object(data: dict[str, Any]) -> str:
    codec = RecordCodec("usage-event")
    framed = codec.encode(_event(codec, data))
    return _read_back(codec, framed, data).hex()


def _confluent(data: dict[str, Any]) -> str:
    codec = RecordCodec("usage-event")
    codec.register_id(data["schema_id"], codec.newest.number)
    body = codec.encode(_event(codec, data["event"]))[SINGLE_OBJECT_HEAD_BYTES:]
    framed = CONFLUENT + data["schema_id"].to_bytes(4, "big") + body
    return _read_back(codec, framed, data["event"]).hex()


def _event(codec: RecordCodec, data: dict[str, Any]) -> dict[str, Any]:
    return record_from_json(codec.newest.parsed, data)


def _read_back(codec: RecordCodec, framed: bytes, data: dict[str, Any]) -> bytes:
    if record_to_json(codec.newest.parsed, codec.decode(framed)) != data:
        raise ValueError("the bytes don't decode to the event")
    return framed


GOLDEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "event-id": lambda data: default_event_id(**data),
    "twin-correction-id": lambda data: twin_correction_id(**data),
    "identity-hash": lambda data: f"{identity_hash(**data):024x}",
    "payload-digest": _payload_digest,
    "window-id": lambda data: WindowRef(**data).window_id,
    "usage-event-single-object": _single_object,
    "usage-event-confluent": _confluent,
    "total-key": lambda data: total_key(**data).hex(),
    "progress-key": lambda data: progress_key(**data).hex(),
    "usage-record-identifier": lambda data: usage_record_identifier(**data),
    "partition": lambda data: partition_for(data["key"].encode(), data["partitions"]),
}
"""What each file of vectors is about: from an input, as JSON, to the output, as JSON."""


def broken_vectors(directory: Path) -> Iterator[tuple[str, str]]:
    """Name of the file and what differs, for every vector of `schemas/golden` that doesn't hold."""
    for name, compute in GOLDEN.items():
        try:
            vectors = json.loads((directory / f"{name}.json").read_text("utf-8"))["vectors"]
        except (OSError, ValueError, KeyError) as error:
            yield name, f"its vectors can't be read: {error}"
            continue
        if not vectors:
            yield name, "has no vectors"
        for number, vector in enumerate(vectors, 1):
            try:
                output = compute(vector["input"])
            except (ValueError, KeyError, TypeError) as error:
                yield name, f"vector {number}: {error}"
                continue
            if output != vector["output"]:
                yield name, f"vector {number} must be {vector['output']}, but is {output}"
