"""Snapshots and totals as Avro, straight from the sums: metering publishes thousands of them at a time.

The bytes are those of `RecordCodec.encode` for the record (`snapshot_to_record`, `total_to_record`), which
takes four times as long: it makes a dict of every SKU, and asks of every number what it is.
"""

from __future__ import annotations

from functools import lru_cache

from meterline.domain.totals import UsageTotal
from meterline.domain.windows import SkuTotal, WindowSnapshot

__all__ = ["snapshot_to_avro", "total_to_avro"]

TEXTS_MAX = 16_384
"""Client ids, SKUs and topic ids kept as they are written: a worker's busy clients, in a few megabytes."""

PAIR_BITS = 14
PAIRS = 1 << PAIR_BITS
"""Numbers are written two bytes at a time: seven bits each, the highest one tells that more follow."""

_MORE = [bytes((pair & 0x7F | 0x80, pair >> 7 | 0x80)) for pair in range(PAIRS)]
_LAST = [bytes((pair & 0x7F | 0x80, pair >> 7)) if pair > 0x7F else bytes((pair,)) for pair in range(PAIRS)]


def snapshot_to_avro(snapshot: WindowSnapshot) -> bytes:
    """A `usage-window` record, its newest version, without a frame."""
    ref = snapshot.ref
    parts = [
        _long(32),
        ref.window_id.encode(),
        _text(ref.client_id),
        _long(ref.start),
        _long(ref.end),
        _text(ref.topic_id),
        _long(ref.partition),
        _long(snapshot.cutoff_offset),
    ]
    if snapshot.skus:
        parts.append(_long(len(snapshot.skus)))
        for sku, sums in sorted(snapshot.skus.items()):
            parts += (_text(sku), _sums(sums))
    parts += (_long(0), _long(snapshot.closed_at), _long(snapshot.watermark))
    return b"".join(parts)


def total_to_avro(total: UsageTotal) -> bytes:
    """A `usage-total` record, its newest version, without a frame."""
    return b"".join(
        (
            _text(total.topic_id),
            _long(total.partition),
            _text(total.client_id),
            _long(total.cutoff_offset),
            _sums(total.sums),
        )
    )


def _sums(sums: SkuTotal) -> bytes:
    written = _long(sums.count) + _long(sums.credits_micro)
    if not sums.free_count and not sums.free_credits_micro:  # as nearly always
        return written + b"\0\0"
    return written + _long(sums.free_count) + _long(sums.free_credits_micro)


def _long(value: int) -> bytes:
    """A number of up to 64 bits: its sign in the lowest bit."""
    rest = value << 1 ^ value >> 63
    if rest < PAIRS:
        return _LAST[rest]
    written = b""
    while rest >= PAIRS:
        written += _MORE[rest & PAIRS - 1]
        rest >>= PAIR_BITS
    return written + _LAST[rest]


@lru_cache(TEXTS_MAX)
def _text(value: str) -> bytes:
    data = value.encode()
    return _long(len(data)) + data
