"""From record batches to columns: find each record, read its event, judge it by itself.

A record is *ordinary* when it is an accepted or duplicate event for all that can be known without other
records: framing and schema known, every rule of `domain.events.check_event` kept, no correction, and encoded
the way encoders do. Whatever else it is, is for the plain meter to say, which has the reasons: a record that
is taken for not ordinary costs time and nothing else. One that is wrongly taken for ordinary costs money.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meterline.domain.credits import CREDITS_MICRO_MAX
from meterline.domain.events import (
    ATTRIBUTE_KEY_BYTES_MAX,
    ATTRIBUTE_VALUE_BYTES_MAX,
    ATTRIBUTES_MAX,
    FUTURE_MAX_MS,
    ID_BYTES_MAX,
)
from meterline.metering.fast.jit import compiled
from meterline.metering.fast.memory import copy, is_ascii, is_equal, words_hash

__all__ = ["BATCH_FIELDS", "CORRUPT", "FIELDS", "NONE", "code_again", "scan_batches"]

# One row per batch: where its records stand, what its header says of all of them.
B_START, B_END, B_COUNT, B_BASE_OFFSET, B_TIMESTAMP, B_APPEND_TIME = range(6)
BATCH_FIELDS = 6

# One row per record. A name alone is a position in the data or a number; `_N` is how many bytes stand there.
(
    OFFSET, TIMESTAMP, BATCH, START, ORDINARY,
    EVENT, EVENT_N, CLIENT, CLIENT_N, CORRELATION, CORRELATION_N, SKU, SKU_N,
    CREDITS, OCCURRED, SOURCE, SOURCE_N, ATTRIBUTES, ATTRIBUTES_COUNT, RESERVATION, RESERVATION_N, BILLABLE,
    CLIENT_CODE, SKU_CODE, SOURCE_CODE,
) = range(25)  # fmt: skip
FIELDS = 25

CORRUPT = -1
"""Instead of a count: the batch is not what its header says. No broker stores that."""

NONE = -1
FAILED = (0, -1)

LENGTH_BYTES_MAX = 9
"""Of a number: nine hold 63 bits, more than any honest one has."""

HEAD_BYTES = 10


@compiled
def _number(data: Any, at: int, end: int) -> Any:
    """A zigzag number and where the next byte is: -1 if it is cut off or too long."""
    if at >= end:
        return FAILED
    first = np.uint64(data[np.uint64(at)])
    if first < 128:
        return np.int64(first >> np.uint64(1)) ^ -np.int64(first & np.uint64(1)), at + 1
    value = first & np.uint64(0x7F)
    for i in range(1, LENGTH_BYTES_MAX):
        if at + i >= end:
            return FAILED
        byte = np.uint64(data[np.uint64(at + i)])
        value |= (byte & np.uint64(0x7F)) << np.uint64(7 * i)
        if byte < 128:
            return np.int64(value >> np.uint64(1)) ^ -np.int64(value & np.uint64(1)), at + i + 1
    return FAILED


@compiled
def _is_utf8(data: Any, at: int, end: int) -> bool:
    """Whether Python's strict decoder takes it: no overlong forms, no surrogates, nothing above U+10FFFF."""
    while at < end:
        first = data[at]
        if first < 0x80:
            at += 1
            continue
        low, high = 0x80, 0xBF
        if 0xC2 <= first <= 0xDF:
            more = 1
        elif 0xE0 <= first <= 0xEF:
            more = 2
            low = 0xA0 if first == 0xE0 else low
            high = 0x9F if first == 0xED else high
        elif 0xF0 <= first <= 0xF4:
            more = 3
            low = 0x90 if first == 0xF0 else low
            high = 0x8F if first == 0xF4 else high
        else:
            return False
        if at + more >= end or data[at + 1] < low or data[at + 1] > high:
            return False
        for i in range(2, more + 1):
            if data[at + i] & 0xC0 != 0x80:
                return False
        at += more + 1
    return True


@compiled
def _text(data: Any, at: int, end: int, least: int, most: int) -> Any:
    """Where a string stands and how many bytes it has; -1 bytes if it isn't one of that length."""
    length, at = _number(data, at, end)
    if at < 0 or length < least or length > most or length > end - at:
        return FAILED
    if not is_ascii(data, at, length) and not _is_utf8(data, at, at + length):
        return FAILED
    return at, length


@compiled
def _attributes(data: Any, at: int, end: int, row: Any) -> int:
    """Pass over the map of one block; -1 if it is another kind, breaks a rule, or has a key twice."""
    count, at = _number(data, at, end)
    if at < 0 or count < 0 or count > ATTRIBUTES_MAX:
        return NONE
    row[ATTRIBUTES] = at
    row[ATTRIBUTES_COUNT] = count
    if count == 0:
        return at
    first = at
    for i in range(count):
        key, length = _text(data, at, end, 0, ATTRIBUTE_KEY_BYTES_MAX)
        if length < 0 or (i > 0 and _has_key(data, first, i, key, length, end)):
            return NONE
        value, value_length = _text(data, key + length, end, 0, ATTRIBUTE_VALUE_BYTES_MAX)
        if value_length < 0:
            return NONE
        at = value + value_length
    if at >= end or data[at] != 0:
        return NONE
    return at + 1


@compiled
def _has_key(data: Any, at: int, count: int, key: int, key_length: int, end: int) -> bool:
    """Whether one of the entries from `at` on has the same key."""
    for _ in range(count):
        length, at = _number(data, at, end)
        if length == key_length:
            same = True
            for i in range(length):
                same &= data[at + i] == data[key + i]
            if same:
                return True
        length, at = _number(data, at + length, end)
        at += length
    return False


@compiled
def _behind_head(data: Any, at: int, end: int, heads: Any, heads_n: Any) -> int:
    """Where the event begins; -1 if the framing is none of the known heads."""
    for i in range(heads.shape[0]):
        length = heads_n[i]
        if end - at >= length and is_equal(heads[i], 0, data, at, length):
            return at + length
    return NONE


@compiled
def _is_ordinary(data: Any, at: int, end: int, heads: Any, heads_n: Any, row: Any) -> bool:
    """Read one value into the row. In the order of the schema's fields, version 1."""
    at = _behind_head(data, at, end, heads, heads_n)
    if at < 0:
        return False
    for field in (EVENT, CLIENT, CORRELATION, SKU):
        start, length = _text(data, at, end, 1, ID_BYTES_MAX)
        if length < 0:
            return False
        row[field] = start
        row[field + 1] = length
        at = start + length
    credit, at = _number(data, at, end)
    if at < 0 or credit < 0 or credit > CREDITS_MICRO_MAX:
        return False
    occurred, at = _number(data, at, end)
    if at < 0 or occurred < 0 or occurred > row[TIMESTAMP] + FUTURE_MAX_MS:
        return False
    row[CREDITS] = credit
    row[OCCURRED] = occurred
    start, length = _text(data, at, end, 0, ID_BYTES_MAX)
    if length < 0:
        return False
    row[SOURCE] = start
    row[SOURCE_N] = length
    at = _attributes(data, start + length, end, row)
    if at < 0 or at >= end:
        return False
    row[RESERVATION_N] = NONE
    if data[at] == 2:
        start, length = _text(data, at + 1, end, 0, ID_BYTES_MAX)
        if length < 0:
            return False
        row[RESERVATION] = start
        row[RESERVATION_N] = length
        at = start + length
    elif data[at] == 0:
        at += 1
    else:
        return False
    # What is left: a boolean, and the branch that says that nothing is corrected.
    if end - at != 2 or data[at] > 1 or data[at + 1] != 0:
        return False
    row[BILLABLE] = data[at]
    return True


@compiled
def _code_of(data: Any, at: int, length: int, table: Any, texts: Any, starts: Any, counts: Any) -> int:
    """The number of a text: the same for the same bytes, counted from 0 in the order of arrival.

    `texts` is a ClickHouse String column as it grows: each text behind its length, one or two bytes.
    """
    mask = np.uint64(table.size - 1)
    slot = words_hash(data, at, length) & mask
    while True:
        code = table[slot]
        if code < 0:
            break
        end = starts[code + 1]
        if end - starts[code] - (1 if length < 128 else 2) == length and is_equal(
            texts, end - length, data, at, length
        ):
            return code
        slot = (slot + np.uint64(1)) & mask
    code = counts[0]
    end = starts[code]
    if length < 128:
        texts[end] = length
        end += 1
    else:
        texts[end] = length & 0x7F | 0x80
        texts[end + 1] = length >> 7
        end += 2
    copy(texts, end, data, at, length)
    starts[code + 1] = end + length
    table[slot] = code
    counts[0] = code + 1
    return code


@compiled
def _behind_headers(data: Any, at: int, end: int) -> int:
    """Pass over a record's headers; -1 if they are no headers."""
    count, at = _number(data, at, end)
    if at < 0 or count < 0:
        return NONE
    for _ in range(count):
        length, at = _number(data, at, end)
        if at < 0 or length < 0 or length > end - at:
            return NONE
        length, at = _number(data, at + length, end)
        if at < 0 or length > end - at:
            return NONE
        at += max(length, 0)
    return at


@compiled
def scan_batches(
    data: Any, batches: Any, first_offset: int, heads: Any, heads_n: Any,
    clients: Any, skus: Any, sources: Any, records: Any,
) -> int:  # fmt: skip
    """Read every record at or behind `first_offset` into `records`; how many, or CORRUPT.

    Args:
        data: uint8, the unpacked records of all batches, and PADDING_BYTES behind them.
        batches: int64[batches, BATCH_FIELDS].
        heads, heads_n: uint8[heads, HEAD_BYTES] and int64[heads]: framings of the schema this reads.
        clients, skus, sources: what `_code_of` needs, as tuples.
        records: int64[at least the batches' counts, FIELDS].
    """
    n = 0
    expected = first_offset
    for b in range(batches.shape[0]):
        at, end = batches[b, B_START], batches[b, B_END]
        for _ in range(batches[b, B_COUNT]):
            start = at
            length, at = _number(data, at, end)
            if at < 0 or length < 1 or length > end - at:
                return CORRUPT
            stop = at + length
            delta, at = _number(data, at + 1, stop)  # behind a byte of attributes, which nobody uses
            if at < 0:
                return CORRUPT
            offset_delta, at = _number(data, at, stop)
            if at < 0:
                return CORRUPT
            length, at = _number(data, at, stop)
            if at < 0 or length > stop - at:
                return CORRUPT
            length, value = _number(data, at + max(length, 0), stop)
            if value < 0 or length > stop - value:
                return CORRUPT
            value_end = value + max(length, 0)
            if _behind_headers(data, value_end, stop) != stop:
                return CORRUPT
            at = stop
            offset = batches[b, B_BASE_OFFSET] + offset_delta
            if offset < first_offset:
                continue
            if offset < expected:
                return CORRUPT
            expected = offset + 1
            row = records[n]
            row[OFFSET] = offset
            row[TIMESTAMP] = batches[b, B_TIMESTAMP] + (0 if batches[b, B_APPEND_TIME] else delta)
            row[BATCH] = b
            row[START] = start
            row[ORDINARY] = 0
            n += 1
            # (A base below 0 could wrap around to a time that looks like one.)
            if length < 0 or row[TIMESTAMP] < 0 or batches[b, B_TIMESTAMP] < 0:
                continue
            if _is_ordinary(data, value, value_end, heads, heads_n, row):
                row[ORDINARY] = 1
                row[CLIENT_CODE] = _code_of(data, row[CLIENT], row[CLIENT_N], *clients)
                row[SKU_CODE] = _code_of(data, row[SKU], row[SKU_N], *skus)
                row[SOURCE_CODE] = _code_of(data, row[SOURCE], row[SOURCE_N], *sources)
        if at != end:
            return CORRUPT
    return n


@compiled
def code_again(table: Any, texts: Any, starts: Any, count: int) -> None:
    """Enter known texts into an empty table."""
    mask = np.uint64(table.size - 1)
    for code in range(count):
        start = starts[code]
        start += 1 if texts[start] < 0x80 else 2
        slot = words_hash(texts, start, starts[code + 1] - start) & mask
        while table[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        table[slot] = code
