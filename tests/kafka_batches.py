"""Record batches as a broker would store them, and both ways of taking them apart."""

from __future__ import annotations

import struct

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c
from aiokafka.structs import TopicPartition

from meterline.streaming import batches

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
APPEND_TIME = 0x08
STOCK = fetcher.PartitionRecords, fetcher.MemoryRecords
TOPIC = "batched"


def batch(base_offset, records, codec="none", append_time=None):
    """Bytes of one batch.

    Args:
        records: (offset, timestamp, key, value, headers).
        append_time: of all records; None: each has its own.
    """
    builder = DefaultRecordBatchBuilder(2, CODECS[codec], 0, -1, -1, -1, 1 << 24)
    for offset, timestamp, key, value, headers in records:
        assert builder.append(offset - base_offset, timestamp, key, value, headers) is not None
    data = bytearray(builder.build())
    struct.pack_into(">q", data, 0, base_offset)
    if append_time is not None:
        struct.pack_into(">h", data, 21, struct.unpack_from(">h", data, 21)[0] | APPEND_TIME)
        struct.pack_into(">q", data, 35, append_time)
    struct.pack_into(">I", data, 17, calc_crc32c(bytes(data[21:])))
    return bytes(data)


def records_of(data, first_offset=0, partition=0):
    """What aiokafka's own classes make of a fetch."""
    walk, memory = STOCK
    tp = TopicPartition(TOPIC, partition)
    return list(walk(tp, memory(data), [], first_offset, None, None, True, 1))  # noqa: FBT003 - aiokafka's


def batches_of(data, first_offset=0, partition=0, checksum=calc_crc32c):
    """What ours make of it."""
    tp = TopicPartition(TOPIC, partition)
    batches._topics_in_batches[TOPIC] = checksum
    kept = batches._KeptRecords(data)
    return list(batches._BatchesOfPartition(tp, kept, [], first_offset, None, None, True, 1))  # noqa: FBT003 - aiokafka's


assert STOCK[1] is MemoryRecords
