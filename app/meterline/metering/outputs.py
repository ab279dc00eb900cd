"""What metering says to others, as records of its topics."""

from __future__ import annotations

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import (
    progress_key,
    progress_to_record,
    total_key,
)
from meterline.contracts.sums_writer import snapshot_to_avro, total_to_avro
from meterline.contracts.topics import USAGE_TOTALS, USAGE_WINDOWS
from meterline.domain.totals import UsageProgress, UsageTotal
from meterline.domain.windows import WindowSnapshot
from meterline.streaming.owner import Output

__all__ = ["progress_output", "total_output", "window_output"]


def window_output(snapshot: WindowSnapshot, codec: RecordCodec, partitions: int) -> Output:
    """A snapshot; all windows of a client meet in one of the `partitions`."""
    key = snapshot.ref.client_id.encode()
    value = codec.head() + snapshot_to_avro(snapshot)
    return Output(USAGE_WINDOWS, partition_for(key, partitions), key, value)


def total_output(total: UsageTotal, codec: RecordCodec) -> Output:
    """A running total; it keeps its source partition."""
    key = total_key(total.topic_id, total.partition, total.client_id)
    return Output(USAGE_TOTALS, total.partition, key, codec.head() + total_to_avro(total))


def progress_output(progress: UsageProgress, codec: RecordCodec) -> Output:
    """How far the totals are published; it goes behind every total it speaks of."""
    key = progress_key(progress.topic_id, progress.partition)
    return Output(USAGE_TOTALS, progress.partition, key, codec.encode(progress_to_record(progress)))
