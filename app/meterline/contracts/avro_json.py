"""Records as Avro's own JSON encoding: how examples and golden vectors are written down.

Bytes are strings of the characters U+0000 to U+00FF, a value of a union stands in `{"type": value}`, times
are integer milliseconds. Any Avro tool reads it.
"""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

from fastavro import json_reader, json_writer

__all__ = ["record_from_json", "record_to_json"]


def record_from_json(schema: Any, data: Any) -> dict[str, Any]:
    """The record in a JSON value.

    Raises:
        ValueError: it isn't one of the schema, or has fields that the schema doesn't have.
    """
    try:
        (record,) = json_reader(StringIO(json.dumps(data)), schema)
    except Exception as error:  # fastavro lets whatever goes wrong inside through
        raise ValueError(f"{type(error).__name__} {error}") from error
    assert isinstance(record, dict)
    written = record_to_json(schema, record)
    if written != data:
        names = sorted(key for key in {*data, *written} if data.get(key) != written.get(key))
        raise ValueError(f"not exactly what the schema says: {', '.join(names)}")
    return record


def record_to_json(schema: Any, record: dict[str, Any]) -> Any:
    """The JSON value of a record."""
    stream = StringIO()
    json_writer(stream, schema, [record])
    return json.loads(stream.getvalue())
