"""Columns that stay bytes between us and ClickHouse: rows that are sent, numbers that are read.

A block is in the Native format: for each column its name, its type and its values one after the other, as the
driver would have written them from Python values, which costs it ten times as much. Column bytes are never
changed once the block is made, so they may be sent again. Of numbers that are read it makes an object each;
as arrays they cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from clickhouse_driver import Client, defines
from clickhouse_driver.block import ColumnOrientedBlock
from clickhouse_driver.columns.service import read_column
from clickhouse_driver.protocol import ClientPacketTypes
from clickhouse_driver.reader import read_binary_str, read_binary_uint8
from clickhouse_driver.result import QueryResult
from clickhouse_driver.streams.native import BlockInputStream
from clickhouse_driver.varint import read_varint

from meterline.errors import WorkerMustExit

__all__ = ["BlockClient", "EncodedBlock", "EncodedColumn", "Insert"]

BLOCK_INFO = bytes((1, 0, 2, 0xFF, 0xFF, 0xFF, 0xFF, 0))
"""Field 1, is_overflows: no; field 2, bucket_num: -1; end."""

NUMBERS = "UInt64"
"""The type of the columns that are read as arrays."""


@dataclass(frozen=True, slots=True)
class EncodedColumn:
    """One column: the pieces of its values, in order."""

    name: str
    type: str
    pieces: tuple[bytes | memoryview, ...]


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """Some rows of a table."""

    rows: int
    columns: tuple[EncodedColumn, ...]


class Insert(list[Sequence[Any]]):
    """What one INSERT sends: columns of Python values, which may be empty, and behind them encoded blocks.

    A list, because that is how the driver tells an INSERT's data from a query's parameters.
    """

    def __init__(self, columns: Sequence[Sequence[Any]], blocks: Sequence[EncodedBlock]) -> None:
        super().__init__(columns)
        self.blocks = blocks


class BlockClient(Client):  # type: ignore[misc]  # the driver has no types
    """The driver's client, taught encoded blocks and arrays; connection, settings and errors are its own."""

    query_result_cls: type[Any]

    def numbers(self, query: str, parameters: dict[str, object]) -> tuple[Any, ...]:
        """The columns of a SELECT, all of them UInt64: uint64[rows] each, and none at all without rows."""
        connection, usual = self.connection, self.query_result_cls
        if not connection.connected:
            connection.connect()
        connection.block_in = _NumberStream(connection.fin, connection.context)
        self.query_result_cls = _NumberColumns
        try:
            columns: tuple[Any, ...] = self.execute(query, parameters, columnar=True)
        finally:
            self.query_result_cls = usual
            if connection.connected:
                connection.block_in = connection.get_block_in_stream()
        return columns

    def send_data(
        self,
        sample_block: Any,
        data: Any,
        types_check: bool = False,  # noqa: FBT001, FBT002 - the driver's signature
        columnar: bool = False,  # noqa: FBT001, FBT002 - the driver's signature
    ) -> Any:
        """Called by `execute` once the server has said which columns it expects.

        Raises:
            WorkerMustExit: it expects other columns or types than a block has.
        """
        if isinstance(data, Insert):
            for block in data.blocks:
                self._send_encoded(sample_block, block)
                self.receive_profile_events()
        # Also sends the empty block that ends the data.
        return super().send_data(sample_block, data, types_check=types_check, columnar=columnar)

    def _send_encoded(self, sample_block: Any, block: EncodedBlock) -> None:
        expected = [tuple(column) for column in sample_block.columns_with_types]
        if expected != [(column.name, column.type) for column in block.columns]:
            raise WorkerMustExit(f"the ledger's table has other columns than this version writes: {expected}")
        connection = self.connection
        has_kind = connection.server_info.used_revision >= defines.DBMS_MIN_REVISION_WITH_CUSTOM_SERIALIZATION
        kind = b"\0" if has_kind else b""  # the type's own serialisation, for servers that know others
        packet: list[bytes | memoryview] = [bytes((ClientPacketTypes.DATA, 0)), BLOCK_INFO]
        packet += [_varint(len(block.columns)), _varint(block.rows)]
        for column in block.columns:
            packet += [_string(column.name), _string(column.type), kind, *column.pieces]
        # The driver's own buffer takes bytes only, and of a memoryview, silently, the first few (0.2.11).
        connection.fout.flush()
        connection.socket.sendall(b"".join(packet))


class _NumberStream(BlockInputStream):  # type: ignore[misc]  # the driver has no types
    """Reads blocks as the driver does, but columns of numbers at one go."""

    def read(self, use_numpy: object = None) -> Any:
        buffer, revision = self.fin, self.context.server_info.used_revision
        block = ColumnOrientedBlock()
        if revision >= defines.DBMS_MIN_REVISION_WITH_BLOCK_INFO:
            block.info.read(buffer)
        columns, rows = read_varint(buffer), read_varint(buffer)
        for _ in range(columns):
            name, type_name = read_binary_str(buffer), read_binary_str(buffer)
            has_kind = revision >= defines.DBMS_MIN_REVISION_WITH_CUSTOM_SERIALIZATION
            is_special = has_kind and bool(read_binary_uint8(buffer))
            block.columns_with_types.append((name, type_name))
            if not rows:
                continue
            if type_name == NUMBERS and not is_special:
                column = np.frombuffer(buffer.read(8 * rows), "<u8")
            else:  # a column of mostly zeros, or a block that tells something else than the result
                column = read_column(
                    self.context, type_name, rows, buffer,
                    use_numpy=use_numpy, has_custom_serialization=is_special,
                )  # fmt: skip
            block.data.append(column)
        return block


class _NumberColumns(QueryResult):  # type: ignore[misc]  # the driver has no types
    """A result of blocks of arrays."""

    def get_result(self) -> tuple[Any, ...]:
        blocks = [
            packet.block.get_columns() for packet in self.packet_generator if getattr(packet, "block", None)
        ]
        columns = zip(*(block for block in blocks if block), strict=True)
        return tuple(np.concatenate([np.asarray(part, np.uint64) for part in column]) for column in columns)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _string(text: str) -> bytes:
    return _varint(len(text)) + text.encode()
