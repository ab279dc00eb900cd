"""The ledger's rows of one flush, as bytes from the start: what the kernels write, as a block of columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from meterline.ledger.blocks import EncodedBlock, EncodedColumn
from meterline.ledger.tables import EVENT_COLUMNS
from meterline.metering.fast.fold import (
    CORRELATION_BYTES,
    EVENT_BYTES,
    FILLED_FIELDS,
    KEY_BYTES,
    R_APPENDED,
    R_ATTRIBUTES,
    R_BILLABLE,
    R_CLIENT,
    R_CREDITS,
    R_DIGEST,
    R_ID_HIGH,
    R_ID_LOW,
    R_NO_RESERVATION,
    R_OCCURRED,
    R_OFFSET,
    R_SKU,
    R_SOURCE,
    RESERVATION_BYTES,
    ROW_CODES,
    ROW_FLAGS,
    ROW_LONGS,
    ROWS,
    VALUE_BYTES,
)  # fmt: skip
from meterline.metering.fast.memory import PADDING_BYTES, power_of_two
from meterline.metering.fast.scan import code_again

__all__ = ["SPARE_MAX", "Names", "Rows"]

ROWS_MIN = 1 << 10
BYTES_MIN = 1 << 16

SPARE_MAX = 4
"""Arrays that are more than so many times as large as what was wanted of them are given up for smaller ones:
a backlog fills a flush with a hundred times as much as the next ones will hold."""

LENGTH_BYTES = 2
"""Of a text of up to 4,096 bytes, before it."""

LOW_CARDINALITY_VERSION = (1).to_bytes(8, "little")
LOW_CARDINALITY_FLAGS = 0x600
"""The block brings its own dictionary, which is the only one."""

Piece = bytes | memoryview


class Names:
    """Texts that come again and again, numbered in the order of arrival: a ClickHouse dictionary."""

    def __init__(self) -> None:
        self._table = np.full(1 << 10, -1, np.int32)
        self._texts = np.empty(BYTES_MIN, np.uint8)
        self._starts = np.zeros(ROWS_MIN, np.int64)
        self._count = np.zeros(1, np.int64)
        self._known: list[str] = []
        self._wanted = [0, 0]
        """Texts and bytes for which there had to be room since the last `clear`."""

    def clear(self) -> None:
        """Begin anew: a dictionary is as large as one flush makes it."""
        texts, text_bytes = self._wanted
        self._wanted = [0, 0]
        self._texts = _fitting(self._texts, max(text_bytes, BYTES_MIN))
        self._starts = _fitting(self._starts, max(texts, ROWS_MIN))
        self._starts[0] = 0
        self._table = _fitting(self._table, power_of_two(2 * max(texts, ROWS_MIN)))
        self._table.fill(-1)
        self._count[0] = 0
        self._known = []

    def lend(self, more: int, more_bytes: int) -> tuple[Any, ...]:
        """The arrays, with room for so many more texts, in the order the kernel takes them."""
        count = int(self._count[0])
        end = int(self._starts[count])
        wanted = [count + more + 1, end + more_bytes + LENGTH_BYTES * more + PADDING_BYTES]
        self._starts = _grown(self._starts, count + 1, wanted[0])
        self._texts = _grown(self._texts, end, wanted[1])
        self._wanted = list(map(max, self._wanted, wanted))
        if (count + more) * 2 > len(self._table):
            self._rehash((count + more) * 2)
        return self._table, self._texts, self._starts, self._count

    def texts(self) -> list[str]:
        """All texts; the index is the number."""
        texts, starts = self._texts, self._starts
        for code in range(len(self._known), int(self._count[0])):
            start = int(starts[code])
            start += 1 if texts[start] < 0x80 else LENGTH_BYTES
            self._known.append(bytes(texts[start : starts[code + 1]]).decode())
        return self._known

    def column(self, codes: Any) -> tuple[Piece, ...]:
        """A LowCardinality(String) column of these numbers."""
        count = int(self._count[0])
        return _low_cardinality(bytes(self._texts[: self._starts[count]]), count, codes)

    def _rehash(self, slots: int) -> None:
        """A larger table; its entries are found again by reading the texts once more."""
        self._table = np.full(power_of_two(slots), -1, np.int32)
        code_again(self._table, self._texts, self._starts, int(self._count[0]))


class Rows:
    """Rows as they come in. Thrown away after their flush: who sends the block may take its time."""

    def __init__(self, like: Rows | None = None) -> None:
        """With the room that was wanted of the ones before: they seldom grow, and do not stay large."""
        self._wanted = [0] * 6
        """Rows and bytes of each text for which there had to be room."""
        n, *sizes = self._wanted if like is None else like._wanted  # noqa: SLF001 - its own class
        n = power_of_two(max(n, ROWS_MIN))
        self._longs: Any = np.empty((ROW_LONGS, n), np.int64)
        self._codes = np.empty((ROW_CODES, n), np.int32)
        self._flags = np.empty((ROW_FLAGS, n), np.uint8)
        self._filled = np.zeros(FILLED_FIELDS, np.int64)
        self._texts: list[Any] = [np.empty(power_of_two(max(size, BYTES_MIN)), np.uint8) for size in sizes]

    def __len__(self) -> int:
        return int(self._filled[ROWS])

    def lend(self, more: int, more_bytes: int) -> tuple[Any, ...]:
        """The arrays in the order the kernel takes them, with room for more rows of so many bytes."""
        count = len(self)
        ends = self._filled[EVENT_BYTES : EVENT_BYTES + 5].tolist()
        wanted = [count + more, *(end + more_bytes + LENGTH_BYTES * more for end in ends)]
        self._wanted = list(map(max, self._wanted, wanted))
        if count + more > self._longs.shape[1]:
            size = max(count + more, 2 * self._longs.shape[1])
            self._longs = _wider(self._longs, count, size)
            self._codes = _wider(self._codes, count, size)
            self._flags = _wider(self._flags, count, size)
        self._texts = list(map(_grown, self._texts, ends, wanted[1:]))
        return self._longs, self._codes, self._flags, self._filled, *self._texts

    def block(
        self, topic_id: str, partition: int, clients: Names, skus: Names, sources: Names
    ) -> EncodedBlock:
        """All rows, in the order of the ledger's columns."""
        n = len(self)
        no_codes = np.zeros(n, np.int32)
        topic = topic_id.encode()

        def long(number: int) -> tuple[Piece, ...]:
            return (_bytes_of(self._longs[number, :n]),)

        def text(number: int) -> tuple[Piece, ...]:
            return (_bytes_of(self._texts[number - EVENT_BYTES][: self._filled[number]]),)

        identity = np.stack([self._longs[R_ID_LOW, :n], self._longs[R_ID_HIGH, :n]], axis=1)
        empty_name = _low_cardinality(b"\0", 1, no_codes)
        columns: dict[str, tuple[str, tuple[Piece, ...]]] = {
            "topic_id": (
                "LowCardinality(String)",
                _low_cardinality(bytes([len(topic)]) + topic, 1, no_codes),
            ),
            "partition": ("UInt32", (np.full(n, partition, "<u4").tobytes(),)),
            "offset": ("Int64", long(R_OFFSET)),
            "appended_at": ("DateTime64(3, 'UTC')", long(R_APPENDED)),
            "event_id": ("String", text(EVENT_BYTES)),
            "client_id": ("LowCardinality(String)", clients.column(self._codes[R_CLIENT, :n])),
            "correlation_id": ("String", text(CORRELATION_BYTES)),
            "sku": ("LowCardinality(String)", skus.column(self._codes[R_SKU, :n])),
            "credits_micro": ("Int64", long(R_CREDITS)),
            "occurred_at": ("DateTime64(3, 'UTC')", long(R_OCCURRED)),
            "source": ("LowCardinality(String)", sources.column(self._codes[R_SOURCE, :n])),
            "attributes": ("Map(String, String)", long(R_ATTRIBUTES) + text(KEY_BYTES) + text(VALUE_BYTES)),
            "reservation_id": (
                "Nullable(String)",
                (_bytes_of(self._flags[R_NO_RESERVATION, :n]), *text(RESERVATION_BYTES)),
            ),
            "billable": ("Bool", (_bytes_of(self._flags[R_BILLABLE, :n]),)),
            "corrects_event_id": ("String", (bytes(n),)),
            "corrects_kind": ("LowCardinality(String)", empty_name),
            "corrects_topic_id": ("LowCardinality(String)", empty_name),
            "corrects_partition": ("UInt32", (bytes(4 * n),)),
            "corrects_offset": ("Int64", (bytes(8 * n),)),
            "identity_hash": ("UInt128", (identity.tobytes(),)),
            "payload_digest": ("UInt64", long(R_DIGEST)),
        }
        return EncodedBlock(n, tuple(EncodedColumn(name, *columns[name]) for name in EVENT_COLUMNS))


def _low_cardinality(texts: bytes, count: int, codes: Any) -> tuple[Piece, ...]:
    """A LowCardinality(String) column: the dictionary, then a number a row, as narrow as the count allows."""
    width, kind = (0, np.uint8) if count <= 1 << 8 else (1, np.uint16) if count <= 1 << 16 else (2, np.uint32)
    head = LOW_CARDINALITY_VERSION + _int64(LOW_CARDINALITY_FLAGS | width) + _int64(count)
    return head, texts, _int64(len(codes)), codes.astype(kind).tobytes()


def _bytes_of(array: Any) -> memoryview:
    """What an array holds, not copied."""
    return memoryview(array).cast("B")


def _int64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _grown(array: Any, used: int, needed: int) -> Any:
    """The array, or a larger copy of what is used of it."""
    if needed <= len(array):
        return array
    larger = np.empty(max(needed, 2 * len(array)), array.dtype)
    larger[:used] = array[:used]
    return larger


def _fitting(array: Any, wanted: int) -> Any:
    """The array, or an empty one of the size that is wanted if it is much larger than that."""
    return array if len(array) <= SPARE_MAX * wanted else np.empty(wanted, array.dtype)


def _wider(table: Any, used: int, size: int) -> Any:
    larger = np.empty((len(table), size), table.dtype)
    larger[:, :used] = table[:, :used]
    return larger
