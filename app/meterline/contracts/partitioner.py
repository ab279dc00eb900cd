"""Kafka's own partitioner, so that every writer puts a client's records into the same partition."""

from __future__ import annotations

from functools import lru_cache

__all__ = ["partition_for"]

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995
_SEED = 0x9747B28C

KEYS_MAX = 16_384
"""Keys whose partition is remembered: a worker's busy clients, in a few megabytes."""


@lru_cache(KEYS_MAX)
def partition_for(key: bytes, partitions: int) -> int:
    """The partition of a key: murmur2 as in Java's default partitioner and librdkafka's `murmur2`."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    """MurmurHash2, 32 bits, with Kafka's seed: Java's `Utils.murmur2`, unsigned."""
    value = _SEED ^ len(data)
    whole = len(data) & ~3
    for start in range(0, whole, 4):
        word = int.from_bytes(data[start : start + 4], "little") * _M & _MASK
        word = (word ^ word >> 24) * _M & _MASK
        value = value * _M & _MASK ^ word
    if rest := data[whole:]:
        value = (value ^ int.from_bytes(rest, "little")) * _M & _MASK
    value = (value ^ value >> 13) * _M & _MASK
    return value ^ value >> 15
