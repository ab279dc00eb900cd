"""Identity and payload of scanned records, hashed over the canonical bytes of `domain.events`."""

from __future__ import annotations

from typing import Any

import numpy as np

from meterline.metering.fast.blake2b import BLOCK_BYTES, LANES, digest_lanes
from meterline.metering.fast.jit import compiled
from meterline.metering.fast.memory import clear, copy
from meterline.metering.fast.scan import (
    BILLABLE,
    CLIENT,
    CLIENT_N,
    CREDITS,
    EVENT,
    EVENT_N,
    ORDINARY,
    SKU,
    SKU_N,
)  # fmt: skip

__all__ = ["HASH_FIELDS", "Scratch", "hash_records"]

IDENTITY_LOW, IDENTITY_HIGH, DIGEST = range(3)
"""The identity's 96 bits as ClickHouse stores them, the low 64 first; and the payload's digest."""
HASH_FIELDS = 3

IDENTITY, PAYLOAD = 0, 1
IDENTITY_TAG = b"20:meterline.identity.1,"
PAYLOAD_TAG = b"19:meterline.payload.1,"
IDENTITY_START, PAYLOAD_START = len(IDENTITY_TAG), len(PAYLOAD_TAG)
IDENTITY_BYTES, PAYLOAD_BYTES = 12, 8

BLOCKS_MAX = 4
"""The longest message: a tag, two ids of 200 bytes, 16 digits of credits, a flag."""
QUEUES = 2 * BLOCKS_MAX

ZERO, TEN = np.uint64(48), np.uint64(10)
"""Numbers in digits. Unsigned: what may be negative is divided another way, which takes longer."""


class Scratch:
    """Where messages wait until there is one for every lane. One queue for each kind and number of blocks."""

    def __init__(self) -> None:
        self.bytes = np.zeros((QUEUES, LANES, BLOCKS_MAX * BLOCK_BYTES), np.uint8)
        # Every message of a queue begins alike: its tag is written once.
        self.bytes[:BLOCKS_MAX, :, : len(IDENTITY_TAG)] = np.frombuffer(IDENTITY_TAG, np.uint8)
        self.bytes[BLOCKS_MAX:, :, : len(PAYLOAD_TAG)] = np.frombuffer(PAYLOAD_TAG, np.uint8)
        self.lengths = np.zeros((QUEUES, LANES), np.int64)
        self.records = np.zeros((QUEUES, LANES), np.int64)
        self.waiting = np.zeros(QUEUES, np.int64)
        self.counted = np.zeros(LANES, np.uint64)
        self.h = np.zeros(8 * LANES, np.uint64)

    def arrays(self) -> tuple[Any, ...]:
        """In the order `hash_records` takes them."""
        return (
            self.bytes, self.bytes.view(np.uint64), self.lengths, self.records, self.waiting,
            self.counted, self.h,
        )  # fmt: skip


@compiled
def _digits(number: int) -> int:
    rest = np.uint64(number)
    count = 1
    while rest >= TEN:
        rest //= TEN
        count += 1
    return count


@compiled
def _put_number(out: Any, at: int, number: int) -> int:
    rest = np.uint64(number)
    end = at + _digits(number)
    for i in range(end - 1, at - 1, -1):
        tens = rest // TEN
        out[np.uint64(i)] = ZERO + rest - tens * TEN
        rest = tens
    return end


@compiled
def _put_field(out: Any, at: int, data: Any, start: int, length: int) -> int:
    """A netstring: the length, a colon, the bytes, a comma."""
    at = _put_number(out, at, length)
    out[at] = 58
    at += 1
    copy(out, at, data, start, length)
    out[at + length] = 44
    return at + length + 1


@compiled
def _field_bytes(length: int) -> int:
    return _digits(length) + length + 2


@compiled
def _swap(word: Any) -> Any:
    """The digest's bytes are read as a big-endian number."""
    out = np.uint64(0)
    for i in range(8):
        out |= ((word >> np.uint64(8 * i)) & np.uint64(0xFF)) << np.uint64(56 - 8 * i)
    return out


@compiled
def _run(
    queue: int, hashes: Any, words: Any, lengths: Any, records: Any, waiting: Any, counted: Any, h: Any
) -> None:  # fmt: skip
    """Hash what waits in one queue; lanes without a message hash what stood there before, unread."""
    kind, blocks = queue // BLOCKS_MAX, queue % BLOCKS_MAX + 1
    size = IDENTITY_BYTES if kind == IDENTITY else PAYLOAD_BYTES
    digest_lanes(words[queue], lengths[queue], blocks, size, counted, h)
    for lane in range(waiting[queue]):
        record = records[queue, lane]
        first = _swap(h[lane])
        if kind == IDENTITY:
            last = _swap(h[LANES + lane]) >> np.uint64(32)
            hashes[record, IDENTITY_LOW] = (first << np.uint64(32)) | last
            hashes[record, IDENTITY_HIGH] = first >> np.uint64(32)
        else:
            hashes[record, DIGEST] = first
    waiting[queue] = 0


@compiled
def hash_records(
    data: Any, rows: Any, count: int, hashes: Any,
    message: Any, words: Any, lengths: Any, records: Any, waiting: Any, counted: Any, h: Any,
) -> None:  # fmt: skip
    """Fill `hashes` (uint64[records, HASH_FIELDS]) for the ordinary ones of the first `count` records."""
    for i in range(count):
        row = rows[i]
        if not row[ORDINARY]:
            continue
        client = _field_bytes(row[CLIENT_N])
        for kind in (IDENTITY, PAYLOAD):
            if kind == IDENTITY:
                length = IDENTITY_START + client + _field_bytes(row[EVENT_N])
            else:
                length = (
                    PAYLOAD_START + client + _field_bytes(row[SKU_N])
                    + _field_bytes(_digits(row[CREDITS])) + 4
                )  # fmt: skip
            blocks = (length + BLOCK_BYTES - 1) // BLOCK_BYTES
            queue = kind * BLOCKS_MAX + blocks - 1
            lane = waiting[queue]
            out = message[queue, lane]
            at = IDENTITY_START if kind == IDENTITY else PAYLOAD_START
            at = _put_field(out, at, data, row[CLIENT], row[CLIENT_N])
            if kind == IDENTITY:
                at = _put_field(out, at, data, row[EVENT], row[EVENT_N])
            else:
                at = _put_field(out, at, data, row[SKU], row[SKU_N])
                at = _put_number(out, at, _digits(row[CREDITS]))
                out[at] = 58
                at = _put_number(out, at + 1, row[CREDITS])
                out[at] = 44
                out[at + 1] = 49
                out[at + 2] = 58
                out[at + 3] = 48 + row[BILLABLE]
                out[at + 4] = 44
                at += 5
            clear(out, at, blocks * BLOCK_BYTES - at)
            lengths[queue, lane] = length
            records[queue, lane] = i
            waiting[queue] = lane + 1
            if lane + 1 == LANES:
                _run(queue, hashes, words, lengths, records, waiting, counted, h)
    for queue in range(QUEUES):
        if waiting[queue]:
            _run(queue, hashes, words, lengths, records, waiting, counted, h)
