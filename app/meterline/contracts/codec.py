"""Records to bytes and back, in both framings.

    Avro single-object   0xC3 0x01, 8-byte little-endian fingerprint of the schema, Avro binary
    Confluent            0x00, 4-byte big-endian id the schema registry gave the schema, Avro binary

Reading takes both; writing takes Confluent framing when a registry URL is set. Either way the schema must be
one of the published versions: a registry id is only another name for one.
"""

from __future__ import annotations

import time
from io import BytesIO
from typing import Any, NoReturn, cast

from fastavro import schemaless_reader, schemaless_writer
from fastavro.validation import validate

from meterline.contracts.registry import SchemaRegistry
from meterline.contracts.versions import SchemaVersion, fingerprint_of, load_versions
from meterline.domain.reasons import Reason
from meterline.errors import DeadLetterError

__all__ = ["RecordCodec"]

SINGLE_OBJECT = b"\xc3\x01"
SINGLE_OBJECT_HEAD_BYTES = 10
CONFLUENT = b"\x00"
CONFLUENT_HEAD_BYTES = 5

UNKNOWN_ID_SECONDS = 30.0
"""The registry is asked at most this often for an id it doesn't know: poison must not flood it."""
UNKNOWN_IDS_MAX = 10_000
"""Unknown ids remembered; beyond, all are forgotten and asked for again."""
DETAIL_CHARS_MAX = 300
"""A decoder's message may quote the data; a dead letter's detail stays readable."""

_Schemas = tuple[Any, Any]
"""The schema the bytes were written with, and the newest one, or None if that is the same."""


class RecordCodec:
    """Encodes with the newest version of one schema, decodes every version into the newest.

    Records are plain dicts: times are integer milliseconds, credits integer micro-credits.
    """

    def __init__(self, name: str, registry_url: str = "") -> None:
        """Load the schema's versions.

        Raises:
            UserError: there is no such schema.
        """
        versions = load_versions(name)
        self.name = name
        self.newest: SchemaVersion = versions[-1]
        self._schema = self.newest.parsed
        self._fingerprints = [version.fingerprint for version in versions]
        self._by_fingerprint: dict[bytes, _Schemas] = {
            version.fingerprint: (version.parsed, None if version is self.newest else self._schema)
            for version in versions
        }
        self._by_head = {SINGLE_OBJECT + key: schemas for key, schemas in self._by_fingerprint.items()}
        self._by_id: dict[int, _Schemas] = {}
        self._unknown_ids: dict[int, float] = {}
        self._registry = SchemaRegistry(registry_url) if registry_url else None
        self._head = b"" if self._registry else SINGLE_OBJECT + self.newest.fingerprint

    def encode(self, record: dict[str, Any]) -> bytes:
        """Frame and bytes of a record.

        Raises:
            ValueError: the record doesn't fit the schema, e.g. credits that are no integer.
            RetryLater: the registry is away.
            UserError: the registry doesn't know the schema.
        """
        stream = BytesIO()
        stream.write(self.head())
        try:
            # The writer alone would truncate a float to an integer, silently: money needs the check.
            validate(record, self._schema, strict=True)
            schemaless_writer(stream, self._schema, record, strict_allow_default=True)
        except Exception as error:  # each of its many errors says the same: this record doesn't fit
            raise ValueError(f"this is no {self.name} record: {error}") from error
        return stream.getvalue()

    def decode(self, data: bytes | None) -> dict[str, Any]:
        """The record in framed bytes.

        Raises:
            DeadLetterError: unknown framing, unknown schema, or bytes that are not what the schema says.
            RetryLater: an id was never seen and the registry is away; only with a registry URL.
        """
        if data is None:
            raise DeadLetterError(Reason.UNKNOWN_FRAMING, "the record has no value")
        schemas = self._by_head.get(data[:SINGLE_OBJECT_HEAD_BYTES])
        start = SINGLE_OBJECT_HEAD_BYTES
        if schemas is None:
            schemas = self._schemas_of_id(data)
            start = CONFLUENT_HEAD_BYTES
        stream = BytesIO(data)
        stream.seek(start)
        try:
            record: Any = schemaless_reader(stream, *schemas)
        except Exception as error:  # hostile bytes raise anything; each is the same dead letter
            # Some of its texts show the stream with its address: a dead letter says the same each time.
            said = str(error).replace(repr(stream), "the record")
            detail = f"not a {self.name}: {type(error).__name__} {said}"[:DETAIL_CHARS_MAX]
            raise DeadLetterError(Reason.UNDECODABLE, detail) from error
        if (end := stream.tell()) != len(data):
            raise DeadLetterError(Reason.UNDECODABLE, f"{len(data) - end} bytes behind the {self.name}")
        return cast("dict[str, Any]", record)

    def head(self) -> bytes:
        """What stands in front of a record of the newest version.

        Raises:
            RetryLater: the registry is away.
            UserError: the registry doesn't know the schema.
        """
        return self._head or self._registered_head()

    def heads(self, version: int) -> list[bytes]:
        """What may stand in front of a record of a version: its fingerprint, a registry id met before."""
        fingerprint = self._fingerprints[version - 1]
        schemas = self._by_fingerprint[fingerprint]
        return [SINGLE_OBJECT + fingerprint] + [
            CONFLUENT + schema_id.to_bytes(CONFLUENT_HEAD_BYTES - 1, "big")
            for schema_id, meant in self._by_id.items()
            if meant is schemas
        ]

    def register_id(self, schema_id: int, version: int) -> None:
        """Say without a registry which version of this schema a Confluent id stands for."""
        self._by_id[schema_id] = self._by_fingerprint[self._fingerprints[version - 1]]

    def _registered_head(self) -> bytes:
        assert self._registry is not None
        schema_id = self._registry.id_of(self.newest)
        self._head = CONFLUENT + schema_id.to_bytes(CONFLUENT_HEAD_BYTES - 1, "big")
        return self._head

    def _schemas_of_id(self, data: bytes) -> _Schemas:
        if data[:1] != CONFLUENT or len(data) < CONFLUENT_HEAD_BYTES:
            _refuse_head(data)
        schema_id = int.from_bytes(data[1:CONFLUENT_HEAD_BYTES], "big")
        schemas = self._by_id.get(schema_id)
        if schemas is None and self._registry is not None:
            schemas = self._ask(self._registry, schema_id)
        if schemas is None:
            raise DeadLetterError(
                Reason.UNKNOWN_SCHEMA, f"no known version of {self.name} has registry id {schema_id}"
            )
        return schemas

    def _ask(self, registry: SchemaRegistry, schema_id: int) -> _Schemas | None:
        now = time.monotonic()
        if now - self._unknown_ids.get(schema_id, -UNKNOWN_ID_SECONDS) < UNKNOWN_ID_SECONDS:
            return None
        schema = registry.schema_of(schema_id)
        schemas = None if schema is None else self._by_fingerprint.get(fingerprint_of(schema))
        if schemas is not None:
            self._by_id[schema_id] = schemas
            return schemas
        if len(self._unknown_ids) >= UNKNOWN_IDS_MAX:
            self._unknown_ids.clear()
        self._unknown_ids[schema_id] = now
        return None


def _refuse_head(data: bytes) -> NoReturn:
    """Say what is wrong with a head that is neither a known fingerprint nor a registry id."""
    if data[:2] == SINGLE_OBJECT and len(data) >= SINGLE_OBJECT_HEAD_BYTES:
        fingerprint = data[2:SINGLE_OBJECT_HEAD_BYTES].hex()
        raise DeadLetterError(Reason.UNKNOWN_SCHEMA, f"no known version has the fingerprint {fingerprint}")
    if data[:1] == CONFLUENT or data[:2] == SINGLE_OBJECT:
        raise DeadLetterError(Reason.UNDECODABLE, f"{len(data)} bytes are too few for the framing")
    raise DeadLetterError(
        Reason.UNKNOWN_FRAMING,
        f"neither Confluent framing nor Avro single-object: {data[:10].hex() or 'empty'}",
    )
