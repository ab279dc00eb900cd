"""A key is in the partition where every Kafka client puts it."""

from __future__ import annotations

import random

import pytest
from aiokafka.partitioner import murmur2

from meterline.contracts.partitioner import partition_for


@pytest.mark.parametrize(
    ("key", "java"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_the_hash_is_javas(key, java):
    """The vectors of Kafka's own UtilsTest; the sign bit is dropped, not negated."""
    assert partition_for(key, 2**31) == java & 0x7FFFFFFF


def test_aiokafka_agrees_on_every_length():
    """The tail of 0 to 3 bytes is where implementations differ."""
    dice = random.Random(7)
    keys = [dice.randbytes(length) for length in range(40) for _ in range(50)]

    assert [partition_for(key, 64) for key in keys] == [(murmur2(key) & 0x7FFFFFFF) % 64 for key in keys]
