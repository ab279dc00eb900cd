"""What metering and billing ask the ledger. Exact whether or not rows were inserted twice or merged.

All functions block; asyncio code calls them in a thread, with a client of its own (`ledger.client.connect`).
They raise what `ledger.client.ledger_errors` raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from meterline.domain.events import FUTURE_MAX_MS
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SkuTotal, WindowRef
from meterline.ledger.client import Client, ledger_errors

__all__ = [
    "CLIENTS_PER_QUERY_MAX",
    "DedupePage",
    "KeptSum",
    "dedupe_pages",
    "dedupe_rows",
    "kept_windows",
    "last_offset",
    "length_sql",
    "partition_offsets",
    "window_sums",
]

CLIENTS_PER_QUERY_MAX = 250
"""Client ids of 200 bytes, written twice and escaped, stay below the 256 KiB a server takes as a query."""

IdColumns = tuple[Any, Any, Any, Any]

KeptSum = tuple[int, str, str, int, int, int, int]
"""Window start (ms), client id, SKU; then count and micro-credits of the billable events, and of the free
ones. A tuple as the driver makes it: a worker may ask for a million of them before it begins."""


class DedupePage(NamedTuple):
    """A stretch of a partition's log, of whose events a second copy may still arrive."""

    first_offset: int
    last_offset: int
    since_ms: int
    """The oldest append time in it."""
    until_ms: int
    """And the newest. Both only spare the server days that it need not read."""


_SKU_TOTALS = """
    countIf(billable), sumIf(credits_micro, billable),
    countIf(NOT billable), sumIf(credits_micro, NOT billable)
"""
# A window's sums fit int64 (metering refuses what would leave that range), and so int64 sums are exact.


def window_sums(client: Client, windows: Sequence[tuple[WindowRef, int]]) -> list[dict[str, SkuTotal]]:
    """What the ledger's rows of each window add up to.

    Args:
        client: used by this call alone.
        windows: each window with its cutoff: rows of its source partition with offset <= cutoff count.

    Returns:
        For each window, in the order asked: SKU -> totals. No rows: an empty dict.
    """
    sums: list[dict[str, SkuTotal]] = [{} for _ in windows]
    for group in _groups(windows):
        indexes = {windows[index][0].client_id: index for index in group}
        window = windows[group[0]][0]
        rows = _execute(
            client,
            f"""
            SELECT client_id, sku, {_SKU_TOTALS}
            FROM
            (
                SELECT client_id, sku, billable, credits_micro
                FROM events
                WHERE client_id IN %(clients)s
                  AND occurred_at >= fromUnixTimestamp64Milli(%(start)s, 'UTC')
                  AND occurred_at < fromUnixTimestamp64Milli(%(end)s, 'UTC')
                  AND appended_at >= fromUnixTimestamp64Milli(%(appended_since)s, 'UTC')
                  AND topic_id = %(topic_id)s AND `partition` = %(partition)s
                  AND `offset` <= transform(toString(client_id), %(clients)s, %(cutoffs)s, toInt64(-1))
                LIMIT 1 BY `offset`
            )
            GROUP BY client_id, sku
            """,  # noqa: S608 - only the constant above is put in
            {
                "clients": list(indexes),
                "cutoffs": [windows[index][1] for index in group],
                "start": window.start,
                "end": window.end,
                "appended_since": _appended_since(window.start),
                "topic_id": window.topic_id,
                "partition": window.partition,
            },
        )
        for client_id, sku, *totals in rows:
            sums[indexes[client_id]][sku] = SkuTotal(*totals)
    return sums


def partition_offsets(client: Client, topic_id: str, partition: int) -> tuple[int, int, int] | None:
    """How many events the ledger has of one source partition, and its first and last offset.

    Returns:
        (count, first, last); None: it has none.
    """
    # FINAL day by day needs memory for a merge only; counting distinct offsets would hold them all.
    ((count, first, last),) = _execute(
        client,
        """
        SELECT count(), min(`offset`), max(`offset`) FROM events FINAL
        WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s
        SETTINGS do_not_merge_across_partitions_select_final = 1
        """,
        {"topic_id": topic_id, "partition": partition},
    )
    return (count, first, last) if count else None


def last_offset(client: Client, topic_id: str, partition: int) -> int | None:
    """Last offset the ledger has of one source partition; None: it has no row.

    Rows need no merge for it: what `partition_offsets` costs grows with all that was ever used.
    """
    ((rows, last),) = _execute(
        client,
        """
        SELECT count(), max(`offset`) FROM events
        WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s
        """,
        {"topic_id": topic_id, "partition": partition},
    )
    return last if rows else None


def dedupe_pages(  # noqa: PLR0917 - six plain facts
    client: Client,
    topic_id: str,
    partition: int,
    applied_offset: int,
    appended_since_ms: int,
    offsets_per_page: int,
) -> list[DedupePage]:
    """Where the events stand a second copy may still arrive of, oldest first, in pages of bounded size.

    By offset and not by time: a backlog of days may have been appended within a minute.

    Rows above `applied_offset` were inserted by a flush that did not commit; they are read from Kafka again
    and must not be taken for duplicates of themselves.
    """
    rows = _execute(
        client,
        """
        SELECT
            intDiv(`offset`, %(offsets)s) AS page, min(`offset`), max(`offset`),
            toUnixTimestamp64Milli(min(appended_at)), toUnixTimestamp64Milli(max(appended_at))
        FROM events
        WHERE appended_at >= fromUnixTimestamp64Milli(%(appended_since)s, 'UTC')
          AND topic_id = %(topic_id)s AND `partition` = %(partition)s AND `offset` <= %(applied_offset)s
        GROUP BY page
        ORDER BY page
        """,
        {
            "offsets": offsets_per_page,
            "appended_since": appended_since_ms,
            "topic_id": topic_id,
            "partition": partition,
            "applied_offset": applied_offset,
        },
    )
    return [DedupePage(*page) for _, *page in rows]


def dedupe_rows(client: Client, topic_id: str, partition: int, page: DedupePage) -> IdColumns:
    """The events of a page: what a worker's dedupe index is rebuilt from.

    Returns:
        Columns in no order, uint64[events] each: low 64 bits of the identity hashes and those above, payload
        digests, append times (ms). An event that was inserted twice may stand there twice.
    """
    with ledger_errors():
        columns = client.numbers(
            """
        SELECT
            toUInt64(bitAnd(identity_hash, 0xFFFFFFFFFFFFFFFF)), toUInt64(bitShiftRight(identity_hash, 64)),
            payload_digest, toUInt64(toUnixTimestamp64Milli(appended_at))
        FROM events
        WHERE appended_at >= fromUnixTimestamp64Milli(%(since_ms)s, 'UTC')
          AND appended_at <= fromUnixTimestamp64Milli(%(until_ms)s, 'UTC')
          AND topic_id = %(topic_id)s AND `partition` = %(partition)s
          AND `offset` BETWEEN %(first_offset)s AND %(last_offset)s
        """,
            {"topic_id": topic_id, "partition": partition, **page._asdict()},
        )
    lows, highs, digests, appended_at = columns or (np.empty(0, np.uint64),) * 4
    return lows, highs, digests, appended_at


def kept_windows(  # noqa: PLR0917 - six plain facts
    client: Client,
    topic_id: str,
    partition: int,
    applied_offset: int,
    occurred_since_ms: int,
    lengths: WindowLengths,
) -> list[KeptSum]:
    """What the windows a worker still keeps must add up to.

    Returns:
        One for each window and SKU, over the rows with `offset` <= `applied_offset` and `occurred_at` >=
        `occurred_since_ms`.
    """
    length = length_sql(lengths, "toUnixTimestamp64Milli(occurred_at)")
    return _execute(
        client,
        f"""
        SELECT
            intDiv(toUnixTimestamp64Milli(occurred_at), {length}) * {length} AS window_start,
            client_id, sku, {_SKU_TOTALS}
        FROM
        (
            SELECT occurred_at, client_id, sku, billable, credits_micro
            FROM events
            WHERE appended_at >= fromUnixTimestamp64Milli(%(appended_since)s, 'UTC')
              AND occurred_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC')
              AND topic_id = %(topic_id)s AND `partition` = %(partition)s AND `offset` <= %(applied_offset)s
            LIMIT 1 BY `offset`
        )
        GROUP BY window_start, client_id, sku
        """,  # noqa: S608 - only the constant above and numbers are put in
        {
            "appended_since": _appended_since(occurred_since_ms),
            "since": occurred_since_ms,
            "topic_id": topic_id,
            "partition": partition,
            "applied_offset": applied_offset,
        },
    )


def length_sql(lengths: WindowLengths, time: str) -> str:
    """How long the window at a time (ms, an expression) is, as an expression."""
    first, *later = lengths.changes
    sql = str(first.length_ms)
    for change in later:
        sql = f"if({time} < {change.starts}, {sql}, {change.length_ms})"
    return sql


def lifetime_totals(
    client: Client, topic_id: str, partition: int, applied_offset: int
) -> dict[str, SkuTotal]:
    """What each client has ever used from one source partition, up to an offset.

    Returns:
        client id -> totals over all SKUs.
    """
    rows = _execute(
        client,
        f"""
        SELECT client_id, {_SKU_TOTALS}
        FROM
        (
            SELECT client_id, billable, credits_micro
            FROM events
            WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s AND `offset` <= %(applied_offset)s
            LIMIT 1 BY `offset`
        )
        GROUP BY client_id
        """,  # noqa: S608 - only the constant above is put in
        {"topic_id": topic_id, "partition": partition, "applied_offset": applied_offset},
    )
    return {client_id: SkuTotal(*totals) for client_id, *totals in rows}


def _groups(windows: Sequence[tuple[WindowRef, int]]) -> list[list[int]]:
    """Indexes of windows one query can sum: same time and source partition, each client once."""
    groups: dict[tuple[int, int, str, int, int], list[int]] = {}
    seen: dict[WindowRef, int] = {}
    for index, (ref, _) in enumerate(windows):
        repeat = seen[ref] = seen.get(ref, -1) + 1
        groups.setdefault((ref.start, ref.end, ref.topic_id, ref.partition, repeat), []).append(index)
    return [
        group[first : first + CLIENTS_PER_QUERY_MAX]
        for group in groups.values()
        for first in range(0, len(group), CLIENTS_PER_QUERY_MAX)
    ]


def _appended_since(occurred_since_ms: int) -> int:
    """Earliest append time of an event that occurred since: lets the server skip whole days.

    Metering accepts no `occurred_at` further ahead of the append time than `FUTURE_MAX_MS`.
    """
    return occurred_since_ms - FUTURE_MAX_MS


def _execute(client: Client, query: str, parameters: dict[str, object]) -> list[Any]:
    with ledger_errors():
        rows: list[Any] = client.execute(query, parameters)
    return rows
