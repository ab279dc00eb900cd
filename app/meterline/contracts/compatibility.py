"""The offline gate of every schema change: no registry, no network.

A schema may change only so that the newest version reads whatever any earlier one wrote (BACKWARD, over all
versions), and a published version never changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType
from avro.errors import AvroException
from avro.schema import make_avsc_object

from meterline.contracts.avro_json import record_from_json
from meterline.contracts.golden import broken_vectors
from meterline.contracts.versions import SchemaVersion, load_versions, schema_names
from meterline.errors import UserError

__all__ = ["Problem", "check_against", "check_schemas"]

NAMESPACE = "meterline"

_EXPLANATIONS = {
    "reader_field_missing_default_value": "new field {what} has no default; give it one",
    "type_mismatch": "{where} changed its type ({what}); add a new field instead",
    "missing_enum_symbols": "enum symbols {what} are gone; keep them, or give the enum a default",
    "missing_union_branch": "{where} no longer takes a type it took ({what}); keep it in the union",
    "name_mismatch": "a type was renamed at {where} ({what}); keep the name, or add an alias",
    "fixed_size_mismatch": "{where} changed its size ({what}); add a new field instead",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one schema, for a person."""

    schema: str
    text: str


def check_schemas(directory: Path) -> list[Problem]:
    """Check every schema of a folder: form, compatibility of all versions, examples, golden vectors.

    Raises:
        UserError: the folder has no schemas, or a file can't be read as one.
    """
    names = schema_names(directory)
    if not names:
        raise UserError(f"There are no schemas in {directory}: expected <name>/v1.avsc.")
    problems = [problem for name in names for problem in _check(name, directory)]
    return problems + [Problem(name, text) for name, text in broken_vectors(directory / "golden")]


def check_against(directory: Path, published: Path) -> list[Problem]:
    """Compare with the schemas of an earlier release: nothing is lost, nothing published has changed.

    Raises:
        UserError: as `check_schemas`.
    """
    names, problems = schema_names(published), []
    if not names:
        raise UserError(f"There are no schemas in {published}: expected <name>/v1.avsc.")
    for name in names:
        if not (directory / name).is_dir():
            problems.append(Problem(name, "the published schema is gone; its records are still in topics"))
            continue
        ours = {version.number: version for version in load_versions(name, directory)}
        for old in load_versions(name, published):
            new = ours.get(old.number)
            if new is None or new.fingerprint != old.fingerprint:
                change = "is gone" if new is None else "has changed"
                text = f"published v{old.number} {change}; put it back and add v{max(ours) + 1}.avsc instead"
                problems.append(Problem(name, text))
            else:
                problems += _incompatibilities(ours[max(ours)], old)
    return problems


def _check(name: str, directory: Path) -> Iterator[Problem]:
    versions = load_versions(name, directory)
    for older, newer in combinations(versions, 2):
        yield from _incompatibilities(newer, older)
    for version in versions:
        yield from _form(version)
    examples = sorted((directory / name / "examples").glob("*.json"))
    if not examples:
        yield Problem(name, "has no example in examples/*.json")
    for path in examples:
        try:
            record_from_json(versions[-1].parsed, json.loads(path.read_text("utf-8")))
        except ValueError as error:
            yield Problem(name, f"example {path.name} doesn't fit v{versions[-1].number}: {error}")


def _incompatibilities(reader: SchemaVersion, writer: SchemaVersion) -> list[Problem]:
    try:
        result = ReaderWriterCompatibilityChecker().get_compatibility(  # type: ignore[no-untyped-call]  # avro has no types
            make_avsc_object(reader.source), make_avsc_object(writer.source)
        )
    except AvroException as error:
        return [Problem(reader.name, f"v{reader.number} or v{writer.number} is no Avro schema: {error}")]
    if result.compatibility is SchemaCompatibilityType.compatible:
        return []
    what = ", ".join(sorted(result.messages))
    where = ", ".join(sorted(_field_names(reader.source, path) for path in result.locations))
    kinds = dict.fromkeys(kind.value for kind in result.incompatibilities)
    reasons = "; ".join(_EXPLANATIONS[kind].format(what=what, where=where) for kind in kinds)
    text = f"v{reader.number} can't read what v{writer.number} wrote: {reasons}"
    return [Problem(reader.name, text)]


def _field_names(schema: Any, path: str) -> str:
    """A checker's location, such as `/fields/4/type`, by the names of the fields."""
    names, part = [], schema
    for step in path.strip("/").split("/"):
        if isinstance(part, dict) and step in part:
            part = part[step]
        elif isinstance(part, list) and step.isdigit() and int(step) < len(part):
            part = part[int(step)]
        if isinstance(part, dict) and "name" in part and step.isdigit():
            names.append(part["name"])
    return ".".join(names) or "the record"


def _form(version: SchemaVersion) -> Iterator[Problem]:
    """What a published schema needs besides being Avro: our name, and a meaning for everything."""
    label, source = f"v{version.number}", version.source
    record = "".join(part.capitalize() for part in version.name.split("-"))
    if (source.get("namespace"), source.get("name")) != (NAMESPACE, record):
        yield Problem(version.name, f"{label} must be the record {NAMESPACE}.{record}")
    for name in _undocumented(source):
        yield Problem(version.name, f"{label}: {name} has no doc")


def _undocumented(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for branch in schema:
            yield from _undocumented(branch)
    elif isinstance(schema, dict):
        if "name" in schema and not schema.get("doc"):
            yield schema["name"]
        for key in ("type", "items", "values", "fields"):
            yield from _undocumented(schema.get(key))
