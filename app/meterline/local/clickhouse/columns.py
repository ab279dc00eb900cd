"""How long a column is on the wire, from its type's name alone.

An insert's blocks go from the client to the engine as they came; to find where a block ends its columns are
walked, not decoded. Layouts: ClickHouse's Native format, as clickhouse-driver writes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from meterline.local.clickhouse.wire import WireReader

__all__ = ["Column", "UnknownTypeError", "column"]

WIDTHS = {
    "Bool": 1, "Int8": 1, "UInt8": 1, "Enum8": 1, "Nothing": 1,
    "Int16": 2, "UInt16": 2, "Enum16": 2, "Date": 2,
    "Int32": 4, "UInt32": 4, "Float32": 4, "Date32": 4, "DateTime": 4, "IPv4": 4, "Decimal32": 4,
    "Int64": 8, "UInt64": 8, "Float64": 8, "DateTime64": 8, "Decimal64": 8,
    "Int128": 16, "UInt128": 16, "UUID": 16, "IPv6": 16, "Decimal128": 16,
    "Int256": 32, "UInt256": 32, "Decimal256": 32,
}  # fmt: skip

DECIMAL_WIDTHS = ((9, 4), (18, 8), (38, 16), (76, 32))
"""Decimal(P, S): up to this precision, so many bytes."""

INDEX_WIDTHS = (1, 2, 4, 8)
"""LowCardinality: bytes of an index, by the lowest byte of its flags."""

TYPE = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)


class UnknownTypeError(Exception):
    """A type whose length on the wire is not known here."""


class Column(Protocol):
    """A column's layout."""

    def skip_prefix(self, reader: WireReader) -> None:
        """Pass over what stands once before the values."""

    def skip(self, reader: WireReader, rows: int) -> None:
        """Pass over the values of `rows` rows."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Values of one width."""

    width: int

    def skip_prefix(self, reader: WireReader) -> None:
        """There is none."""

    def skip(self, reader: WireReader, rows: int) -> None:
        """All values at once."""
        reader.skip(self.width * rows)


@dataclass(frozen=True, slots=True)
class Strings:
    """Length-prefixed values."""

    def skip_prefix(self, reader: WireReader) -> None:
        """There is none."""

    def skip(self, reader: WireReader, rows: int) -> None:
        """One after the other."""
        reader.skip_strings(rows)


@dataclass(frozen=True, slots=True)
class Nullable:
    """A byte per row, then the values."""

    inner: Column

    def skip_prefix(self, reader: WireReader) -> None:
        """The inner column's."""
        self.inner.skip_prefix(reader)

    def skip(self, reader: WireReader, rows: int) -> None:
        """The map of nulls, then a value for each row, also for the nulls."""
        reader.skip(rows)
        self.inner.skip(reader, rows)


@dataclass(frozen=True, slots=True)
class Array:
    """End offsets, then the items of all rows together. Map and Nested are arrays of tuples."""

    inner: Column

    def skip_prefix(self, reader: WireReader) -> None:
        """The inner column's."""
        self.inner.skip_prefix(reader)

    def skip(self, reader: WireReader, rows: int) -> None:
        """The last offset is the number of items."""
        if rows:
            reader.skip(8 * (rows - 1))
            self.inner.skip(reader, reader.uint64())


@dataclass(frozen=True, slots=True)
class Tuple:
    """Its columns one after the other."""

    items: tuple[Column, ...]

    def skip_prefix(self, reader: WireReader) -> None:
        """All prefixes stand before all values."""
        for item in self.items:
            item.skip_prefix(reader)

    def skip(self, reader: WireReader, rows: int) -> None:
        """Column by column."""
        for item in self.items:
            item.skip(reader, rows)


@dataclass(frozen=True, slots=True)
class LowCardinality:
    """A dictionary, then an index per row."""

    inner: Column

    def skip_prefix(self, reader: WireReader) -> None:
        """The version of the keys' serialisation."""
        reader.skip(8)

    def skip(self, reader: WireReader, rows: int) -> None:
        """Flags, dictionary, indexes; nothing at all for no rows."""
        if rows:
            width = INDEX_WIDTHS[reader.uint64() & 0x3]
            self.inner.skip(reader, reader.uint64())
            reader.skip(width * reader.uint64())


@lru_cache(maxsize=4_096)  # as many different types as a server's tables may reasonably have
def column(type_name: str) -> Column:
    """The layout of a type.

    Raises:
        UnknownTypeError: JSON, Variant, Dynamic, aggregate states: nothing the pipeline inserts.
    """
    matched = TYPE.fullmatch(type_name)
    if matched is None:
        raise UnknownTypeError(type_name)
    name, arguments = matched[1], _split(matched[2] or "", ",")
    if name == "String":
        return Strings()
    width = _width(name, arguments)
    return _composite(type_name, name, arguments) if width is None else Fixed(width)


def _width(name: str, arguments: list[str]) -> int | None:
    """Bytes of a value, where all are equally long."""
    if name == "FixedString":
        return int(arguments[0])
    if name == "Decimal":
        return next(width for precision, width in DECIMAL_WIDTHS if int(arguments[0]) <= precision)
    return WIDTHS.get(name)


def _composite(type_name: str, name: str, arguments: list[str]) -> Column:
    """The layout of a type made of others."""
    inner = [
        column(_split(argument, " ")[-1]) for argument in arguments
    ]  # `x Int32`: a tuple's item has a name
    match name, inner:
        case "Nullable", [item]:
            return Nullable(item)
        case "LowCardinality", [item]:
            # Of a nullable dictionary only the keys are written: the first one stands for NULL.
            return LowCardinality(item.inner if isinstance(item, Nullable) else item)
        case "Array", [item]:
            return Array(item)
        case (("Map" | "Nested"), items):
            return Array(Tuple(tuple(items)))
        case "Tuple", items:
            return Tuple(tuple(items))
        case _:
            raise UnknownTypeError(type_name)


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside of brackets and quotes; empty parts are left out."""
    parts, part, depth, quote = [], "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'`":
            quote = character
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == separator and depth == 0:
            parts.append(part.strip())
            part = ""
            continue
        part += character
    parts.append(part.strip())
    return [part for part in parts if part]
