"""Ordinary records in offset order: deduplicate, add up, write the ledger's columns. Integers only.

The same rules as `Meter._take_event`, for the cases in which they say yes. Where they could say anything else
(a conflict, a sum near the end of int64, one SKU too many) the kernel stops in front of the record, having
changed nothing for it, and the plain meter decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meterline.metering.fast.hashing import DIGEST, IDENTITY_HIGH, IDENTITY_LOW
from meterline.metering.fast.jit import compiled
from meterline.metering.fast.memory import copy, prefetch
from meterline.metering.fast.scan import (
    ATTRIBUTES,
    ATTRIBUTES_COUNT,
    BILLABLE,
    CLIENT_CODE,
    CORRELATION,
    CORRELATION_N,
    CREDITS,
    EVENT,
    EVENT_N,
    OCCURRED,
    OFFSET,
    ORDINARY,
    RESERVATION,
    RESERVATION_N,
    SKU_CODE,
    SOURCE_CODE,
    TIMESTAMP,
)  # fmt: skip

__all__ = ["fold_records", "slot_of"]

# Where the partition stands: the Meter's own numbers, lent to the kernel for the time of a call.
NEXT_OFFSET, APPENDED_AT, WATERMARK, SKIPPED, DUPLICATES, ROOM, IDS = range(7)
STATE_FIELDS = 7
"""ROOM: credits that can still be added before any sum could leave int64. IDS: slots taken in the index."""

# The rules.
WINDOW_LENGTH, GRACE, LATENESS, HORIZON, SKU_ROOM = range(5)
RULE_FIELDS = 5
"""SKU_ROOM: SKUs that can still be added before any window could have too many."""

# The index of ids: uint64[slots, ID_FIELDS], a power of two of slots, open addressing.
ID_LOW, ID_HIGH, ID_DIGEST, ID_TIME = range(4)
ID_FIELDS = 4
NO_TIME = np.uint64(2**64 - 1)
"""The time of a free slot."""

# Windows and their SKUs as far as this run of records changes them.
G_START, G_CLIENT, G_LATE, G_LAST_OFFSET, G_CELLS, G_COUNT, G_CREDITS, G_FREE_COUNT, G_FREE_CREDITS = range(9)
GROUP_FIELDS = 9
C_GROUP, C_SKU, C_COUNT, C_CREDITS, C_FREE_COUNT, C_FREE_CREDITS = range(6)
CELL_FIELDS = 6
GROUPS, CELLS = range(2)

# Rows of the ledger: numbers of fixed width, and how far the texts have come.
R_OFFSET, R_APPENDED, R_CREDITS, R_OCCURRED, R_DIGEST, R_ID_LOW, R_ID_HIGH, R_ATTRIBUTES = range(8)
ROW_LONGS = 8
R_CLIENT, R_SKU, R_SOURCE = range(3)
ROW_CODES = 3
R_BILLABLE, R_NO_RESERVATION = range(2)
ROW_FLAGS = 2
ROWS, EVENT_BYTES, CORRELATION_BYTES, KEY_BYTES, VALUE_BYTES, RESERVATION_BYTES, ATTRIBUTES_ENDED = range(7)
FILLED_FIELDS = 7

SPREAD = np.uint64(0x9E3779B97F4A7C15)

LOOK_AHEAD = 8
"""Records ahead whose slot in the index is fetched: it is hardly ever near, and a record takes a fifth of the
time that it needs to come."""


@compiled
def slot_of(index: Any, low: Any, high: Any) -> Any:
    """The slot that holds an id, or the free one that would."""
    mask = np.uint64(index.shape[0] - 1)
    slot = low & mask
    while index[slot, ID_TIME] != NO_TIME and (index[slot, ID_LOW] != low or index[slot, ID_HIGH] != high):
        slot = (slot + np.uint64(1)) & mask
    return slot


@compiled
def _find(table: Any, entries: Any, first: int, second: int) -> Any:
    """The slot of the entry that begins with these two numbers, or the free one for it."""
    mask = np.uint64(table.size - 1)
    h = (np.uint64(first) * SPREAD + np.uint64(second)) * SPREAD
    slot = (h ^ (h >> np.uint64(32))) & mask
    while True:
        number = table[slot]
        if number < 0 or (entries[number, 0] == first and entries[number, 1] == second):
            return slot
        slot = (slot + np.uint64(1)) & mask


@compiled
def _copy(out: Any, at: int, data: Any, start: int, length: int) -> int:
    """Append a text behind its length, one or two bytes; where the next one begins."""
    rest = length
    while rest >= 0x80:
        out[at] = rest & 0x7F | 0x80
        rest >>= 7
        at += 1
    out[at] = rest
    at += 1
    copy(out, at, data, start, length)
    return at + length


@compiled
def _length(data: Any, at: int) -> Any:
    """An Avro length that was read before: the number, and where the text begins."""
    value: Any = 0
    shift = 0
    while data[at] >= 0x80:
        value |= np.int64(data[at] & 0x7F) << shift
        shift += 7
        at += 1
    return (value | np.int64(data[at]) << shift) >> 1, at + 1


@compiled
def _write_row(
    data: Any, row: Any, hashed: Any,
    longs: Any, codes: Any, flags: Any, filled: Any,
    events: Any, correlations: Any, keys: Any, values: Any, reservations: Any,
) -> None:  # fmt: skip
    n = filled[ROWS]
    longs[R_OFFSET, n] = row[OFFSET]
    longs[R_APPENDED, n] = row[TIMESTAMP]
    longs[R_CREDITS, n] = row[CREDITS]
    longs[R_OCCURRED, n] = row[OCCURRED]
    longs[R_DIGEST, n] = np.int64(hashed[DIGEST])
    longs[R_ID_LOW, n] = np.int64(hashed[IDENTITY_LOW])
    longs[R_ID_HIGH, n] = np.int64(hashed[IDENTITY_HIGH])
    codes[R_CLIENT, n] = row[CLIENT_CODE]
    codes[R_SKU, n] = row[SKU_CODE]
    codes[R_SOURCE, n] = row[SOURCE_CODE]
    flags[R_BILLABLE, n] = row[BILLABLE]
    filled[EVENT_BYTES] = _copy(events, filled[EVENT_BYTES], data, row[EVENT], row[EVENT_N])
    filled[CORRELATION_BYTES] = _copy(
        correlations, filled[CORRELATION_BYTES], data, row[CORRELATION], row[CORRELATION_N]
    )
    at = row[ATTRIBUTES]
    for _ in range(row[ATTRIBUTES_COUNT]):
        length, at = _length(data, at)
        filled[KEY_BYTES] = _copy(keys, filled[KEY_BYTES], data, at, length)
        at += length
        length, at = _length(data, at)
        filled[VALUE_BYTES] = _copy(values, filled[VALUE_BYTES], data, at, length)
        at += length
    filled[ATTRIBUTES_ENDED] += row[ATTRIBUTES_COUNT]
    longs[R_ATTRIBUTES, n] = filled[ATTRIBUTES_ENDED]
    none = row[RESERVATION_N] < 0
    flags[R_NO_RESERVATION, n] = none
    filled[RESERVATION_BYTES] = _copy(
        reservations, filled[RESERVATION_BYTES], data, row[RESERVATION], 0 if none else row[RESERVATION_N]
    )
    filled[ROWS] = n + 1


@compiled
def fold_records(
    data: Any, records: Any, hashes: Any, first: int, count: int, rules: Any, state: Any, index: Any,
    group_table: Any, groups: Any, cell_table: Any, cells: Any, counts: Any, rows: Any,
) -> int:  # fmt: skip
    """Take in records from `first` on; the number of the one that is for the plain meter, or `count`."""
    length, grace = rules[WINDOW_LENGTH], rules[GRACE]
    slots = np.uint64(index.shape[0] - 1)
    for i in range(first, count):
        row = records[i]
        if not row[ORDINARY]:
            return i
        if i + LOOK_AHEAD < count:
            prefetch(index, np.int64(hashes[i + LOOK_AHEAD, IDENTITY_LOW] & slots))
        appended_at = max(state[APPENDED_AT], row[TIMESTAMP])
        low, high, digest = hashes[i, IDENTITY_LOW], hashes[i, IDENTITY_HIGH], hashes[i, DIGEST]
        slot = slot_of(index, low, high)
        is_new_id = index[slot, ID_TIME] == NO_TIME
        if not is_new_id and appended_at - np.int64(index[slot, ID_TIME]) <= rules[HORIZON]:
            if index[slot, ID_DIGEST] != digest:
                return i
            state[DUPLICATES] += 1
        else:
            start = row[OCCURRED] - row[OCCURRED] % length
            group_slot = _find(group_table, groups, start, row[CLIENT_CODE])
            group = group_table[group_slot]
            is_new_group = group < 0
            if is_new_group:
                group = counts[GROUPS]
            cell_slot = _find(cell_table, cells, group, row[SKU_CODE])
            cell = cell_table[cell_slot]
            if cell < 0:
                held = 0 if is_new_group else groups[group, G_CELLS]
                if held >= rules[SKU_ROOM]:
                    return i
            if row[CREDITS] > state[ROOM]:
                return i
            # From here on the record is accepted.
            state[ROOM] -= row[CREDITS]
            if is_new_group:
                group_table[group_slot] = group
                counts[GROUPS] += 1
                groups[group, G_START] = start
                groups[group, G_CLIENT] = row[CLIENT_CODE]
                groups[group, G_LATE] = 0
                for field in range(G_CELLS, GROUP_FIELDS):
                    groups[group, field] = 0
            groups[group, G_LAST_OFFSET] = row[OFFSET]
            if cell < 0:
                cell = counts[CELLS]
                cell_table[cell_slot] = cell
                counts[CELLS] += 1
                cells[cell, C_GROUP] = group
                cells[cell, C_SKU] = row[SKU_CODE]
                for field in range(C_COUNT, CELL_FIELDS):
                    cells[cell, field] = 0
                groups[group, G_CELLS] += 1
            if row[BILLABLE]:
                cells[cell, C_COUNT] += 1
                cells[cell, C_CREDITS] += row[CREDITS]
                groups[group, G_COUNT] += 1
                groups[group, G_CREDITS] += row[CREDITS]
            else:
                cells[cell, C_FREE_COUNT] += 1
                cells[cell, C_FREE_CREDITS] += row[CREDITS]
                groups[group, G_FREE_COUNT] += 1
                groups[group, G_FREE_CREDITS] += row[CREDITS]
            if is_new_id:
                index[slot, ID_LOW] = low
                index[slot, ID_HIGH] = high
                state[IDS] += 1
            index[slot, ID_DIGEST] = digest
            index[slot, ID_TIME] = np.uint64(row[TIMESTAMP])
            groups[group, G_LATE] += start + length + grace <= state[WATERMARK]
            state[WATERMARK] = max(state[WATERMARK], row[OCCURRED] - rules[LATENESS])
            _write_row(data, row, hashes[i], *rows)
        state[SKIPPED] += row[OFFSET] - state[NEXT_OFFSET]
        state[NEXT_OFFSET] = row[OFFSET] + 1
        state[APPENDED_AT] = appended_at
    return count


@compiled
def move_ids(index: Any, larger: Any, appended_at: int, horizon: int) -> int:
    """Copy the ids within the horizon into an empty index; how many."""
    count = 0
    for i in range(index.shape[0]):
        at = index[i, ID_TIME]
        if at != NO_TIME and appended_at - np.int64(at) <= horizon:
            slot = slot_of(larger, index[i, ID_LOW], index[i, ID_HIGH])
            for field in range(ID_FIELDS):
                larger[slot, field] = index[i, field]
            count += 1
    return count
