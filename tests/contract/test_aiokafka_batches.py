"""What streaming/batches.py relies on in aiokafka's fetcher stands still."""

from __future__ import annotations

import inspect

import pytest
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.util import calc_crc32c
from tests import kafka_batches
from tests.kafka_batches import CODECS

from meterline.metering.fast import load_fast_path
from meterline.streaming.batches import BatchedRecords, RawBatch, keep_batches_whole

FAST = load_fast_path()
CHECKSUMS = [calc_crc32c, *filter(None, [FAST and FAST.fast_crc32c()])]
RECORDS = [(offset, 1_000 + offset, b"k", b"v" * offset, [("h", b"x")]) for offset in range(5, 25)]


def test_a_fetch_is_taken_apart_by_two_names_of_the_module():
    """They are what `keep_batches_whole` replaces; a third place would go on making records."""
    source = inspect.getsource(fetcher)

    assert source.count("MemoryRecords(") == 1
    assert source.count(" PartitionRecords(") == 1
    arguments = list(inspect.signature(kafka_batches.STOCK[0].__init__).parameters)
    assert arguments == [
        *("self", "tp", "records", "aborted_transactions", "fetch_offset", "key_deserializer"),
        *("value_deserializer", "check_crcs", "isolation_level"),
    ]


def test_the_walk_through_a_fetch_is_by_batch():
    """Whatever it decides of a batch, it asks the batch; whatever it yields passes `_consumer_record`."""
    source = inspect.getsource(kafka_batches.STOCK[0]._unpack_records)

    for asked in ("validate_crc", "producer_id", "base_offset", "is_control_batch", "is_transactional"):
        assert f"next_batch.{asked}" in source
    assert "for record in next_batch" in source
    assert "self._consumer_record(tp, record)" in source


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("append_time", [None, 77_000])
def test_a_batch_holds_the_same_records(codec, append_time):
    """Every codec, both kinds of time."""
    data = kafka_batches.batch(5, RECORDS, codec, append_time)
    (batch,) = kafka_batches.batches_of(data)
    expected = kafka_batches.records_of(data)

    assert isinstance(batch, RawBatch)
    assert (batch.base_offset, batch.offset, batch.count) == (5, 24, 20)
    assert [(r.offset, r.timestamp, r.key, r.value, r.headers) for r in expected] == [
        (r.offset, r.timestamp, r.key, r.value, r.headers) for r in BatchedRecords([batch])
    ]


@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_a_broken_checksum_is_noticed(checksum):
    """A flipped bit on the way is no poison record: it is fetched again."""
    data = bytearray(kafka_batches.batch(5, RECORDS))
    (whole,) = kafka_batches.batches_of(bytes(data), checksum=checksum)
    data[100] ^= 1

    assert whole.count == len(RECORDS)
    with pytest.raises(CorruptRecordException):
        kafka_batches.batches_of(bytes(data), checksum=checksum)


def test_other_topics_get_records(monkeypatch):
    """The replaced names serve every consumer of the process."""
    monkeypatch.setattr(fetcher, "MemoryRecords", fetcher.MemoryRecords)
    monkeypatch.setattr(fetcher, "PartitionRecords", fetcher.PartitionRecords)
    keep_batches_whole("one")
    data = kafka_batches.batch(5, RECORDS)
    tp = kafka_batches.TopicPartition("other", 0)
    walk = fetcher.PartitionRecords(tp, fetcher.MemoryRecords(data), [], 5, None, None, True, 1)  # noqa: FBT003 - aiokafka's

    assert [record.offset for record in walk] == [offset for offset, *_ in RECORDS]
