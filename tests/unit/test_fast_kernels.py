# ruff: noqa: E402 - the extra may be missing, and then nothing of it can be imported
"""The kernels' parts, each against what it stands for."""

from __future__ import annotations

import random
import tempfile
from hashlib import blake2b
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="the extra `fast` is not installed")
pytest.importorskip("numba", reason="the extra `fast` is not installed")

from aiokafka.record.util import calc_crc32c

from meterline.contracts.files import schemas_dir
from meterline.metering.fast import factory, fold, hashing, memory, scan
from meterline.metering.fast.blake2b import BLOCK_BYTES, LANES, digest_lanes
from meterline.metering.fast.crc32c import fast_crc32c
from meterline.metering.fast.hashing import IDENTITY_TAG, PAYLOAD_TAG
from meterline.metering.fast.index import SLOTS_MIN, ArrayIndex
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SliceFiles

HOUR = 3_600_000


def files():
    return SliceFiles(Path(tempfile.gettempdir()), 2**30, HOUR)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40, 4_096, 4_103])
def test_a_checksum_is_aiokafkas(length):
    """Another one would refuse honest batches, for ever."""
    checksum = fast_crc32c() or calc_crc32c  # whose processor has no instruction for it
    data = random.Random(length).randbytes(length)

    assert calc_crc32c(data) == checksum(memoryview(data))


@pytest.mark.parametrize("length", [0, 1, 8, 127, 128, 129, 256, 257, 511, 512])
@pytest.mark.parametrize("size", [8, 12])
def test_every_lane_is_hashlibs_blake2b(length, size):
    """The hashes are in the ledger and in the contract: one other bit and every id is new."""
    chance = random.Random(length)
    messages = [chance.randbytes(length) for _ in range(LANES)]
    data = np.zeros((LANES, 4 * BLOCK_BYTES), np.uint8)
    for row, message in zip(data, messages, strict=True):
        row[:length] = np.frombuffer(message, np.uint8)
    h = np.zeros(8 * LANES, np.uint64)
    counted = np.zeros(LANES, np.uint64)
    lengths = np.full(LANES, length, np.int64)
    digest_lanes(data.view(np.uint64), lengths, max(1, -(-length // BLOCK_BYTES)), size, counted, h)

    digests = h.reshape(8, LANES).T.astype("<u8")
    assert [blake2b(message, digest_size=size).digest() for message in messages] == [
        digest.tobytes()[:size] for digest in digests
    ]


def test_the_tags_are_the_contracts():
    """Golden vectors name the tag in front of each message."""
    for name, tag in (("identity-hash", IDENTITY_TAG), ("payload-digest", PAYLOAD_TAG)):
        golden = schemas_dir() / "golden" / f"{name}.json"
        assert tag[3:-1].decode() in golden.read_text()


def test_the_array_index_answers_as_the_plain_one_does():
    """Copies within the horizon and beyond it, a clock that steps back, many more than it began with."""
    chance = random.Random(1)
    ours, theirs, now = ArrayIndex(files()), SlicedIndex(files()), 10 * HOUR
    for _ in range(5 * SLOTS_MIN):
        at = now + chance.randrange(-2_000, 2_000)
        now = max(now, at)
        identity = chance.randrange(2 * SLOTS_MIN) << 64 | chance.randrange(2)
        assert theirs.find(identity, now) == ours.find(identity, now)
        if theirs.find(identity, now) is None:
            digest = chance.getrandbits(64)
            ours.add(identity, digest, at)
            theirs.add(identity, digest, at)


def test_an_index_forgets_what_is_too_old_to_matter():
    """Its memory is bounded by the horizon, not by the life of the worker."""
    index = ArrayIndex(files())
    for number in range(20 * SLOTS_MIN):
        index.add(number << 40, number, number * HOUR // SLOTS_MIN)

    assert len(index.slots) <= 8 * SLOTS_MIN
    assert len(index) < 8 * SLOTS_MIN


def test_warming_up_runs_every_kernel():
    """None may be left for the compiler when the first record comes."""
    factory.warm_up()
    kernels = [fold.fold_records, fold.move_ids, fold.slot_of, hashing.hash_records]
    for kernel in [*kernels, scan.scan_batches, scan.code_again]:
        assert len(kernel.signatures) == 1, f"{kernel.__name__} has {kernel.signatures}"


@pytest.mark.parametrize("length", [*range(18), 63, 64, 65, 200])
def test_texts_are_told_apart_by_their_own_bytes_only(length):
    """Words are read beyond a text's end: what stands there must not count, and every byte within must."""
    chance = random.Random(length)
    text = chance.randbytes(length)

    def placed(content):
        before, behind = chance.randbytes(3), chance.randbytes(memory.PADDING_BYTES)
        return np.frombuffer(before + content + behind, np.uint8)

    one, same = placed(text), placed(text)
    assert memory.is_equal(one, 3, same, 3, length)
    assert memory.words_hash(one, 3, length) == memory.words_hash(same, 3, length)
    for at in range(length):
        for bit in range(8):
            other = placed(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :])
            assert not memory.is_equal(one, 3, other, 3, length)
            assert memory.words_hash(one, 3, length) != memory.words_hash(other, 3, length)


@pytest.mark.parametrize("length", [*range(18), 63, 64, 65, 200])
def test_one_byte_beyond_ascii_is_found_wherever_it_stands(length):
    """Such a text is looked at by the decoder's rules; one that is missed would be stored unread."""
    padding = b"\xff" * memory.PADDING_BYTES
    text = bytes([0x7F]) * length
    assert memory.is_ascii(np.frombuffer(b"\xff" + text + padding, np.uint8), 1, length)
    for at in range(length):
        odd = text[:at] + b"\x80" + text[at + 1 :]
        assert not memory.is_ascii(np.frombuffer(b"\xff" + odd + padding, np.uint8), 1, length)
