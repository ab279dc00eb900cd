"""The versions of each Avro schema, as files: `schemas/<name>/v<number>.avsc`, numbered from 1."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastavro.schema import SchemaParseException, fingerprint, parse_schema, to_parsing_canonical_form

from meterline.contracts.files import schemas_dir
from meterline.errors import UserError

__all__ = ["SchemaVersion", "fingerprint_of", "load_versions", "schema_names"]


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """One version of one schema.

    Attributes:
        source: the schema as written in the file, with docs and logical types.
        parsed: ready for fastavro, without docs and logical types: times are integers, in milliseconds.
        fingerprint: CRC-64-AVRO of the canonical form, 8 bytes, little-endian.
    """

    name: str
    number: int
    source: Any
    parsed: Any
    fingerprint: bytes


def schema_names(directory: Path | None = None) -> list[str]:
    """Names of all schemas, sorted."""
    return sorted(path.parent.name for path in (directory or schemas_dir()).glob("*/v1.avsc"))


def load_versions(name: str, directory: Path | None = None) -> list[SchemaVersion]:
    """All versions of a schema, oldest first.

    Raises:
        UserError: there is no such schema, a number is missing, or a file is no Avro schema.
    """
    folder = (directory or schemas_dir()) / name
    numbers = sorted(int(path.stem[1:]) for path in folder.glob("v*.avsc") if path.stem[1:].isdigit())
    if not numbers:
        raise UserError(f"There is no schema named {name!r}: expected {folder / 'v1.avsc'}.")
    if numbers != list(range(1, len(numbers) + 1)):
        raise UserError(
            f"Versions of {name} must be numbered 1, 2, 3 ... without a gap; {folder} has {numbers}."
        )
    return [_load(name, number, folder / f"v{number}.avsc") for number in numbers]


def fingerprint_of(schema: Any) -> bytes:
    """CRC-64-AVRO of a schema's canonical form: docs, defaults and logical types make no difference."""
    return bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))


def _load(name: str, number: int, path: Path) -> SchemaVersion:
    try:
        source = json.loads(path.read_text("utf-8"))
        parsed = parse_schema(_bare(source))
        return SchemaVersion(name, number, source, parsed, fingerprint_of(source))
    except (ValueError, KeyError, TypeError, SchemaParseException) as error:
        raise UserError(f"{path} is no valid Avro schema: {error}") from error


def _bare(schema: Any) -> Any:
    """Without docs and logical types: datetimes make decoding 1.8 times as dear, and integers are exact."""
    if isinstance(schema, dict):
        if "logicalType" in schema:
            return schema["type"]
        return {key: _bare(value) for key, value in schema.items() if key != "doc"}
    if isinstance(schema, list):
        return [_bare(part) for part in schema]
    return schema
