"""Fast meters, and the compiler's work before the first one is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meterline.domain.events import UsageEvent
from meterline.domain.reasons import Reason
from meterline.domain.window_lengths import WindowLengths
from meterline.errors import DeadLetterError
from meterline.metering.fast.batch_meter import BatchMeter
from meterline.metering.fast.crc32c import fast_crc32c
from meterline.metering.fast.index import ArrayIndex
from meterline.metering.fast.rows import Names
from meterline.metering.slices import SliceFiles
from meterline.metering.state import Meta
from meterline.settings import MeteringSettings
from meterline.streaming.batches import BatchedRecords, RawBatch

__all__ = ["fast_crc32c", "make_meter", "warm_up"]


def make_meter(
    partition: int,
    settings: MeteringSettings,
    decode: Callable[[bytes | None], UsageEvent],
    meta: Meta,
    heads: Callable[[], Sequence[bytes]],
) -> BatchMeter:
    """A meter that has seen nothing."""
    return BatchMeter(partition, settings, decode, meta, ArrayIndex(SliceFiles.of(settings)), heads)


def warm_up() -> None:
    """Compile every kernel, or load what an earlier process compiled: seconds, or half of one."""
    settings = MeteringSettings()  # type: ignore[call-arg]  # defaults stand in Field()
    meta = Meta("", "", -1, 0, 0, WindowLengths.of(1_000))
    meter = make_meter(0, settings, _refuse, meta, lambda: [b"\xc3\x01"])
    # One ordinary record and one poison: every kernel runs.
    records = b"".join(_record(number, value) for number, value in enumerate((_EVENT, b"")))
    meter.take(BatchedRecords([RawBatch("", 0, 0, 1, 2, 1, 1, records)]))
    meter.build_flush(0)
    index = ArrayIndex(SliceFiles.of(settings))
    index.make_room(10_000, 1)
    index.find(1, 1)
    Names().lend(10_000, 0)
    if (crc32c := fast_crc32c()) is not None:
        crc32c(memoryview(records))


_EVENT = b"\xc3\x01" + b"\x02e\x02c\x02t\x02s\x02\x02\x00\x00\x00\x01\x00"
"""A head and an event: ids e, c, t, s; 1 micro-credit at 1 ms; no source, attributes or reservation."""


def _record(number: int, value: bytes) -> bytes:
    """A stored record without key and headers."""
    body = bytes((0, 0, number * 2, 1, len(value) * 2)) + value + b"\0"
    return bytes((len(body) * 2,)) + body


def _refuse(_value: bytes | None) -> UsageEvent:
    raise DeadLetterError(Reason.UNDECODABLE, "nothing to decode")
