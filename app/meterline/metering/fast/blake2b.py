"""BLAKE2b of many short messages at a time, bit for bit as `domain.events` hashes identity and payload.

Sixteen messages go through the rounds side by side, one in each lane: the compiler turns a loop over lanes
into vector instructions (a single hash gains nothing: each of its steps waits for the one before). Measured
against hashlib, one message at a time from Python: 0.17 and 1.1 microseconds.

Reference: RFC 7693.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meterline.metering.fast.jit import compiled

__all__ = ["BLOCK_BYTES", "LANES", "digest_lanes"]

LANES = 16
BLOCK_BYTES = 128
WORDS = 16

IV = np.array(
    [
        0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
        0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
    ],
    np.uint64,
)  # fmt: skip

SIGMA = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
        [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
        [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
        [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
        [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
        [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
        [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
        [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
        [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    ],
    np.uint64,
)
ROUNDS = 12

U = np.uint64
ROW = SIGMA * U(LANES)
"""Where the message word of each step begins, in words stored lane by lane."""

PARAMETERS = U(0x0101_0000)
"""No key, sequential, fan-out and depth 1; the digest's length is added."""


@compiled
def _mix(v: Any, a: Any, b: Any, c: Any, d: Any, m: Any, x: Any, y: Any) -> None:
    """The function G on one column or diagonal of every lane. Indexes are unsigned: signed ones could be
    negative, and the compiler would look at each lane by itself.
    """  # noqa: D205 - one sentence that needs two lines
    for i in range(LANES):
        lane = U(i)
        p = v[a + lane] + v[b + lane] + m[x + lane]
        q = v[d + lane] ^ p
        q = (q >> U(32)) | (q << U(32))
        r = v[c + lane] + q
        s = v[b + lane] ^ r
        s = (s >> U(24)) | (s << U(40))
        p = p + s + m[y + lane]
        q = q ^ p
        q = (q >> U(16)) | (q << U(48))
        r = r + q
        s = s ^ r
        s = (s >> U(63)) | (s << U(1))
        v[a + lane] = p
        v[b + lane] = s
        v[c + lane] = r
        v[d + lane] = q


@compiled
def digest_lanes(words: Any, lengths: Any, blocks: int, size: int, v: Any, h: Any, m: Any) -> None:
    """Hash one message in each lane, all of the same number of blocks.

    Args:
        words: uint64[LANES, >= blocks * 16], little-endian, zero behind each message.
        lengths: int64[LANES], bytes of the messages.
        size: bytes of the digests.
        v: scratch, uint64[16 * LANES]. m: scratch, likewise.
        h: uint64[8 * LANES]; afterwards word k of lane l's digest stands at k * LANES + l.
    """
    for k in range(U(8)):
        for i in range(U(LANES)):
            h[k * U(LANES) + i] = IV[k]
    for i in range(U(LANES)):
        h[i] ^= PARAMETERS ^ U(size)
    for block in range(U(blocks)):
        last = block == U(blocks) - U(1)
        for word in range(U(WORDS)):
            for i in range(U(LANES)):
                m[word * U(LANES) + i] = words[i, block * U(WORDS) + word]
        for k in range(U(8)):
            for i in range(U(LANES)):
                v[k * U(LANES) + i] = h[k * U(LANES) + i]
                v[(k + U(8)) * U(LANES) + i] = IV[k]
        for i in range(U(LANES)):
            counted = U(lengths[i]) if last else (block + U(1)) * U(BLOCK_BYTES)
            v[U(12 * LANES) + i] ^= counted
            if last:
                v[U(14 * LANES) + i] = ~v[U(14 * LANES) + i]
        _rounds(v, m)
        for k in range(U(8)):
            for i in range(U(LANES)):
                h[k * U(LANES) + i] ^= v[k * U(LANES) + i] ^ v[(k + U(8)) * U(LANES) + i]


@compiled
def _rounds(v: Any, m: Any) -> None:
    for r in range(ROUNDS):
        at = ROW[r]
        _mix(v, U(0), U(64), U(128), U(192), m, at[0], at[1])
        _mix(v, U(16), U(80), U(144), U(208), m, at[2], at[3])
        _mix(v, U(32), U(96), U(160), U(224), m, at[4], at[5])
        _mix(v, U(48), U(112), U(176), U(240), m, at[6], at[7])
        _mix(v, U(0), U(80), U(160), U(240), m, at[8], at[9])
        _mix(v, U(16), U(96), U(176), U(192), m, at[10], at[11])
        _mix(v, U(32), U(112), U(128), U(208), m, at[12], at[13])
        _mix(v, U(48), U(64), U(144), U(224), m, at[14], at[15])
