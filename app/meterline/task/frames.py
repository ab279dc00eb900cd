"""How records lie in a segment of the spool: frames of bytes. Pure; the files are in `segments.py`.

    frame    magic (4), payload bytes (4, little-endian), BLAKE2b-64 of segment, offset, payload (8), payload
    payload  records, each: bytes (4, little-endian), the record

One frame is what one fsync made durable, and a writer begins the next only after it. Hence whatever follows
a frame that is whole was written after that one was durable: a broken frame with nothing whole behind it is
the torn end of a write nobody was told of; with a whole one behind it, durable bytes have changed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

__all__ = [
    "FRAME_BYTES_MAX",
    "FRAME_HEAD_BYTES",
    "Scan",
    "build_frame",
    "frame_bytes",
    "pack",
    "read_frame",
    "scan",
    "unpack",
]

FRAME_BYTES_MAX = 64 * 1024 * 1024
"""A length beyond it is no length: a broken head must not make the reader look for gigabytes."""

_MAGIC = b"\xf1MLS"
"""Neither zeros, as unwritten parts of a segment are, nor text."""
_HEAD = struct.Struct("<4sI8s")
_PLACE = struct.Struct("<QQ")
_LENGTH = struct.Struct("<I")
FRAME_HEAD_BYTES = _HEAD.size


class Scan(NamedTuple):
    """What a segment holds.

    Attributes:
        end: offset behind the last whole frame from the beginning on.
        tail: behind it, bytes up to the last one that is not zero.
        whole_again: offset of a whole frame behind the end, or None.
    """

    end: int
    tail: int
    whole_again: int | None


def build_frame(segment: int, offset: int, payload: bytes) -> bytes:
    """The bytes of a frame that will stand at this place, and is believed at no other."""
    assert 0 < len(payload) <= FRAME_BYTES_MAX
    return _HEAD.pack(_MAGIC, len(payload), _digest(segment, offset, payload)) + payload


def read_frame(data: bytes, at: int, segment: int, offset: int) -> bytes | None:
    """The payload of the frame that begins at `data[at]`; None: there is no whole frame.

    Args:
        offset: where `data[at]` is in the segment.
    """
    if len(data) - at < FRAME_HEAD_BYTES:
        return None
    magic, length, digest = _HEAD.unpack_from(data, at)
    begin = at + FRAME_HEAD_BYTES
    if magic != _MAGIC or not 0 < length <= min(FRAME_BYTES_MAX, len(data) - begin):
        return None
    payload = data[begin : begin + length]
    return payload if digest == _digest(segment, offset, payload) else None


def frame_bytes(head: bytes) -> int:
    """How long the frame with this head says it is; 0: it is no head."""
    if len(head) < FRAME_HEAD_BYTES:
        return 0
    magic, length, _ = _HEAD.unpack_from(head)
    return FRAME_HEAD_BYTES + length if magic == _MAGIC and 0 < length <= FRAME_BYTES_MAX else 0


def scan(data: bytes, segment: int) -> Scan:
    """Look at a whole segment."""
    end = 0
    while (payload := read_frame(data, end, segment, end)) is not None:
        end += FRAME_HEAD_BYTES + len(payload)
    tail = len(data[end:].rstrip(b"\0"))
    found = data.find(_MAGIC, end + 1)
    while found >= 0 and read_frame(data, found, segment, found) is None:
        found = data.find(_MAGIC, found + 1)
    return Scan(end, tail, found if found >= 0 else None)


def pack(records: Iterable[bytes]) -> bytes:
    """The payload with these records."""
    return b"".join(_LENGTH.pack(len(record)) + record for record in records)


def unpack(payload: bytes) -> list[bytes]:
    """The records in a payload whose digest was right."""
    records = []
    at = 0
    while at < len(payload):
        (length,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        records.append(payload[at : at + length])
        at += length
    return records


def _digest(segment: int, offset: int, payload: bytes) -> bytes:
    digest = blake2b(_PLACE.pack(segment, offset), digest_size=8)
    digest.update(payload)
    return digest.digest()
