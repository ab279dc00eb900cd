"""Record batches as the broker stored them: unpacked, checked, and not taken apart.

aiokafka makes several Python objects of every record before anybody has asked for one. For the source topic
of a worker that reads whole batches, its fetcher hands on one object for each batch instead. All that it
decides by batch stays its own: what a wrong checksum means, aborted transactions, control records, positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from aiokafka import codec
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c

__all__ = ["BatchedRecords", "Checksum", "RawBatch", "StoredRecord", "keep_batches_whole"]

HEADER_BYTES = 61
LENGTH_AT, LENGTH_END = 8, 12
CHECKED_FROM = 21
"""The checksum is over all that stands behind it."""
COUNT_AT = 57
MAGIC = 2
"""Of record batches since Kafka 0.11, the only ones Kafka 4 keeps."""

UNPACK = {1: codec.gzip_decode, 2: codec.snappy_decode, 3: codec.lz4_decode, 4: codec.zstd_decode}
"""By the codec's number in a batch's attributes."""

Checksum = Callable[[memoryview], int]
"""The CRC-32C of some bytes."""


class StoredRecord(NamedTuple):
    """One record: what `owner.SourceRecord` asks for."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


@dataclass(frozen=True, slots=True)
class RawBatch:
    """One batch.

    Attributes:
        base_offset: of the first record the producer put into it.
        offset: of the last one.
        count: records in it.
        timestamp: the append time of all its records, or what their own times are counted from.
        timestamp_type: 1: append time.
        payload: the records, one after the other.
    """

    topic: str
    partition: int
    base_offset: int
    offset: int
    count: int
    timestamp: int
    timestamp_type: int
    payload: bytes | memoryview

    def record(self, at: int) -> tuple[StoredRecord, int]:
        """The record that begins there, and where the next one does.

        Raises:
            CorruptRecordException: the bytes are no record.
        """
        try:
            return self._record(at)
        except (IndexError, ValueError) as error:
            raise CorruptRecordException(f"{self.topic}-{self.partition}: {error}") from error

    def _record(self, at: int) -> tuple[StoredRecord, int]:
        data = self.payload
        length, at = _number(data, at)
        end = at + length
        delta, at = _number(data, at + 1)  # behind a byte of attributes, which nobody uses
        offset_delta, at = _number(data, at)
        key, at = _bytes(data, at)
        value, at = _bytes(data, at)
        count, at = _number(data, at)
        headers = []
        for _ in range(count):
            name, at = _bytes(data, at)
            content, at = _bytes(data, at)
            headers.append(((name or b"").decode(errors="backslashreplace"), content))
        if at != end or at > len(data):
            raise ValueError(f"a record of {length} bytes in a batch from {self.base_offset} on ends at {at}")
        timestamp = self.timestamp + (0 if self.timestamp_type else delta)
        return StoredRecord(self.base_offset + offset_delta, timestamp, key, value, tuple(headers)), end


class BatchedRecords:
    """Records of one partition that follow one another, in whole batches.

    Iterating takes them apart one by one; who can read batches does not iterate.
    """

    def __init__(self, batches: Sequence[RawBatch], first_offset: int = 0) -> None:
        """Records below the first offset stand in a batch and are not part of this."""
        self.batches = batches
        self.first_offset = first_offset

    def since(self, offset: int) -> BatchedRecords:
        """Those at or behind an offset."""
        batches = [batch for batch in self.batches if batch.offset >= offset]
        return BatchedRecords(batches, max(offset, self.first_offset))

    def __iter__(self) -> Iterator[StoredRecord]:
        for batch in self.batches:
            at = 0
            for _ in range(batch.count):
                record, at = batch.record(at)
                if record.offset >= self.first_offset:
                    yield record
            if at != len(batch.payload):
                raise CorruptRecordException(f"bytes behind the last record of {batch.base_offset}")


def _number(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
        shift += 7


def _bytes(data: bytes | memoryview, at: int) -> tuple[bytes | None, int]:
    length, at = _number(data, at)
    if length < 0:
        return None, at
    return bytes(data[at : at + length]), at + length


# -- in aiokafka's fetcher

_topics_in_batches: dict[str, Checksum] = {}


class _KeptRecords(MemoryRecords):  # type: ignore[misc]  # aiokafka has no types
    """A fetch's answer that can still be read as bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data


class _WholeBatch:
    """A batch of aiokafka's that iterates over itself: one "record", as far as the fetcher can see."""

    def __init__(self, batch: Any, stored: memoryview, checksum: Checksum) -> None:
        self._batch = batch
        self._stored = stored
        self._checksum = checksum
        self.offset: int = batch.next_offset - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)  # the marker in a control batch

    def validate_crc(self) -> bool:
        return bool(self._batch.crc == self._checksum(self._stored[CHECKED_FROM:]))

    def __iter__(self) -> Iterator[_WholeBatch]:
        return iter((self,)) if self._count else iter(())  # compaction leaves empty batches

    @property
    def _count(self) -> int:
        return int.from_bytes(self._stored[COUNT_AT:HEADER_BYTES], "big")

    def unpacked(self, tp: Any) -> RawBatch:
        """The batch without aiokafka."""
        batch = self._batch
        payload: Any = self._stored[HEADER_BYTES:]
        if batch.compression_type:
            payload = UNPACK[batch.compression_type](payload.tobytes())
        return RawBatch(
            tp.topic, tp.partition, batch.base_offset, self.offset, self._count,
            batch.max_timestamp if batch.timestamp_type else batch.first_timestamp,
            batch.timestamp_type, payload,
        )  # fmt: skip


class _WholeBatches:
    """What `PartitionRecords` reads batches from."""

    def __init__(self, records: _KeptRecords, checksum: Checksum) -> None:
        self._records = records
        self._checksum = checksum
        self._data = memoryview(records.data)
        self._at = 0

    def has_next(self) -> bool:
        return bool(self._records.has_next())

    def next_batch(self) -> _WholeBatch:
        batch = self._records.next_batch()
        if batch.magic != MAGIC:
            raise CorruptRecordException(f"a record batch of format {batch.magic}, not {MAGIC}")
        start = self._at
        self._at += LENGTH_END + int.from_bytes(self._data[start + LENGTH_AT : start + LENGTH_END], "big")
        return _WholeBatch(batch, self._data[start : self._at], self._checksum)


class _BatchesOfPartition(fetcher.PartitionRecords):  # type: ignore[misc]  # aiokafka ships no types
    """aiokafka's walk through a fetch, one step a batch for the topics that want it."""

    def __init__(self, tp: Any, records: _KeptRecords, *rest: Any) -> None:
        checksum = _topics_in_batches.get(tp.topic)
        super().__init__(tp, records if checksum is None else _WholeBatches(records, checksum), *rest)

    def _consumer_record(self, tp: Any, record: Any) -> Any:
        if isinstance(record, _WholeBatch):
            return record.unpacked(tp)
        return super()._consumer_record(tp, record)


def keep_batches_whole(topic: str, checksum: Checksum | None = None) -> None:
    """From now on every consumer of this process gets `RawBatch` objects of a topic, not records.

    Args:
        checksum: a faster one than aiokafka's.

    The two names in aiokafka's module are the only places where it says which classes take a fetch apart.
    """
    _topics_in_batches[topic] = checksum or calc_crc32c
    fetcher.MemoryRecords = _KeptRecords
    fetcher.PartitionRecords = _BatchesOfPartition
