"""Blocks of the Native format: find their ends, cut a result into them, write a header."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO

from meterline.local.clickhouse.columns import column
from meterline.local.clickhouse.wire import WireReader, string, varint

__all__ = ["header_block", "header_of", "skip_block", "split_blocks"]


def skip_block(reader: WireReader) -> int:
    """Pass over one block; how many rows it has.

    Raises:
        UnknownTypeError: a column whose length is not known; the rest of the stream can't be read.
    """
    columns, rows = reader.varint(), reader.varint()
    for _ in range(columns):
        reader.string()
        layout = column(reader.string())
        if rows:
            layout.skip_prefix(reader)
            layout.skip(reader, rows)
    return rows


def split_blocks(data: bytes) -> Iterator[bytes]:
    """The blocks of a whole result: a client reads exactly one block from each packet."""
    reader = WireReader(BytesIO(data).read)
    end = 0
    while end < len(data):
        skip_block(reader)
        yield reader.since(end)
        end = reader.mark()


def header_of(block: bytes) -> bytes:
    """The block of no rows that tells the names and types of another one."""
    reader = WireReader(BytesIO(block).read)
    columns, rows = reader.varint(), reader.varint()
    described = []
    for _ in range(columns):
        name, type_name = reader.string(), reader.string()
        described.append((name, type_name))
        if rows:
            layout = column(type_name)
            layout.skip_prefix(reader)
            layout.skip(reader, rows)
    return header_block(described)


def header_block(columns: Sequence[tuple[str, str]]) -> bytes:
    """A block of no rows that tells names and types."""
    named = b"".join(string(name) + string(type_name) for name, type_name in columns)
    return varint(len(columns)) + varint(0) + named
