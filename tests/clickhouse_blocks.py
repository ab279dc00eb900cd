"""Read an encoded block back with the driver's own code."""

from __future__ import annotations

from clickhouse_driver.bufferedreader import BufferedSocketReader
from clickhouse_driver.columns.service import read_column
from clickhouse_driver.context import Context


class _Bytes:
    """A socket that has received everything already."""

    def __init__(self, data):
        self._data = memoryview(data)

    def recv_into(self, buffer):
        count = min(len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


def columns_of(block):
    """Python values, column by column, as a SELECT of the driver would return them."""
    context = Context()
    context.client_settings = {"strings_as_bytes": False, "strings_encoding": "utf-8", "use_numpy": False}
    context.settings = {}
    read = {}
    for column in block.columns:
        data = b"".join(column.pieces)
        kind = "Int64" if column.type.startswith("DateTime64") else column.type
        reader = BufferedSocketReader(_Bytes(data + b"end"), 1 << 20)
        read[column.name] = list(read_column(context, kind, block.rows, reader))
        assert reader.read(3) == b"end", f"{column.name} has bytes behind its last value"
    return read


def rows_of(block):
    """Tuples in the block's order of columns."""
    return list(zip(*columns_of(block).values(), strict=True))
