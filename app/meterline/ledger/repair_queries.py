"""What a repair asks the ledger about one source partition: the state that its rows add up to.

All functions block and raise what `ledger.client.ledger_errors` raises. They read a partition's whole
history, day by day (FINAL needs memory for a merge only): a repair may take minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SkuTotal
from meterline.ledger.client import Client, ledger_errors
from meterline.ledger.queries import length_sql

__all__ = [
    "RowSummary",
    "StateWindow",
    "client_totals",
    "event_offsets",
    "published_windows",
    "row_summary",
    "state_windows",
    "told_windows",
]

_SKU_TOTALS = """
    countIf(billable), sumIf(credits_micro, billable),
    countIf(NOT billable), sumIf(credits_micro, NOT billable)
"""
_ROWS = "events FINAL WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s AND `offset` <= %(until)s"
_BY_DAY = "SETTINGS do_not_merge_across_partitions_select_final = 1"


@dataclass(frozen=True, slots=True)
class RowSummary:
    """The rows of a source partition up to an offset. Times in ms."""

    count: int
    first_offset: int
    last_offset: int
    newest_occurred_at: int
    newest_appended_at: int


@dataclass(frozen=True, slots=True)
class StateWindow:
    """One client's window as the rows have it."""

    skus: dict[str, SkuTotal]
    last_offset: int
    """Of its newest row."""
    published_cutoff: int
    """Of the newest snapshot that billing has written to the ledger; -1: none."""


def row_summary(client: Client, topic_id: str, partition: int, until: int) -> RowSummary | None:
    """What rows there are up to an offset; None: none."""
    ((count, *facts),) = _execute(
        client,
        f"""
        SELECT count(), min(`offset`), max(`offset`), max(toUnixTimestamp64Milli(occurred_at)),
               max(toUnixTimestamp64Milli(appended_at))
        FROM {_ROWS} {_BY_DAY}
        """,  # noqa: S608 - only constants are put in, here and below
        {"topic_id": topic_id, "partition": partition, "until": until},
    )
    return RowSummary(count, *facts) if count else None


def client_totals(
    client: Client, topic_id: str, partition: int, until: int
) -> dict[str, tuple[SkuTotal, int]]:
    """What each client has ever used up to an offset, and the offset of its newest row."""
    rows = _execute(
        client,
        f"SELECT client_id, max(`offset`), {_SKU_TOTALS} FROM {_ROWS} GROUP BY client_id {_BY_DAY}",  # noqa: S608 - as above
        {"topic_id": topic_id, "partition": partition, "until": until},
    )
    return {client_id: (SkuTotal(*totals), last) for client_id, last, *totals in rows}


def published_windows(client: Client, topic_id: str, partition: int) -> list[tuple[int, int]]:
    """Start and end (ms) of the windows that were published and are in the ledger, oldest first."""
    return _execute(
        client,
        """
        SELECT DISTINCT toUnixTimestamp64Milli(window_start) AS since, toUnixTimestamp64Milli(window_end)
        FROM window_snapshots WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s
        ORDER BY since
        """,
        {"topic_id": topic_id, "partition": partition},
    )


def state_windows(  # noqa: PLR0917 - six plain facts, in the order of queries.kept_windows
    client: Client, topic_id: str, partition: int, until: int, lengths: WindowLengths, ended_since_ms: int
) -> dict[tuple[int, str], StateWindow]:
    """The windows a worker must know: those that ended lately, and those not published as they are now.

    Args:
        until: rows up to this offset count.
        ended_since_ms: windows that end after it are kept though they are published.

    Returns:
        (window start in ms, client) -> window.
    """
    length = length_sql(lengths, "toUnixTimestamp64Milli(occurred_at)")
    end = f"used.window_start + {length_sql(lengths, 'used.window_start')}"
    rows = _execute(
        client,
        f"""
        SELECT used.window_start, used.client_id, sku, window_last, said.next_cutoff - 1, c, m, fc, fm
        FROM
        (
            SELECT
                intDiv(toUnixTimestamp64Milli(occurred_at), {length}) * {length} AS window_start,
                client_id, sku,
                countIf(billable) AS c, sumIf(credits_micro, billable) AS m,
                countIf(NOT billable) AS fc, sumIf(credits_micro, NOT billable) AS fm,
                max(max(`offset`)) OVER (PARTITION BY window_start, client_id) AS window_last
            FROM {_ROWS}
            GROUP BY window_start, client_id, sku
        ) AS used
        LEFT JOIN
        (
            -- One more than the cutoff: 0 is what a join gives where there is none.
            SELECT toUnixTimestamp64Milli(window_snapshots.window_start) AS window_start, client_id,
                   max(cutoff_offset) + 1 AS next_cutoff
            FROM window_snapshots WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s
            GROUP BY window_start, client_id
        ) AS said ON used.window_start = said.window_start AND used.client_id = said.client_id
        WHERE {end} > %(ended_since)s OR window_last >= said.next_cutoff
        {_BY_DAY}
        """,  # noqa: S608 - as above
        {
            "topic_id": topic_id,
            "partition": partition,
            "until": until,
            "ended_since": ended_since_ms,
        },
    )
    windows: dict[tuple[int, str], StateWindow] = {}
    for start, client_id, sku, last, cutoff, *totals in rows:
        window = windows.setdefault((start, client_id), StateWindow({}, last, cutoff))
        window.skus[sku] = SkuTotal(*totals)
    return windows


def told_windows(
    client: Client, topic_id: str, partition: int, first_start: int, last_start: int
) -> dict[tuple[int, str], tuple[int, dict[str, SkuTotal]]]:
    """What was published of windows, as far as billing has written it to the ledger.

    Args:
        first_start: of the windows that are asked for, start of the first one (ms), and of the last one.

    Returns:
        (window start in ms, client) -> cutoff of the newest snapshot, and its totals by SKU.
    """
    rows = _execute(
        client,
        """
        SELECT toUnixTimestamp64Milli(window_start), client_id, cutoff_offset,
               arrayZip(skus, counts, credits_micro, free_counts, free_credits_micro)
        FROM windows
        WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s
          AND window_start BETWEEN fromUnixTimestamp64Milli(%(first)s, 'UTC')
                               AND fromUnixTimestamp64Milli(%(last)s, 'UTC')
        """,
        {"topic_id": topic_id, "partition": partition, "first": first_start, "last": last_start},
    )
    return {
        (start, client_id): (cutoff, {sku: SkuTotal(*totals) for sku, *totals in skus})
        for start, client_id, cutoff, skus in rows
    }


def event_offsets(client: Client, topic_id: str, partition: int, first: int, last: int) -> set[int]:
    """Which offsets of a range have a row. A range of 100,000 offsets takes some megabytes."""
    rows = _execute(
        client,
        """
        SELECT DISTINCT `offset` FROM events
        WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s
          AND `offset` BETWEEN %(first)s AND %(last)s
        """,
        {"topic_id": topic_id, "partition": partition, "first": first, "last": last},
    )
    return {offset for (offset,) in rows}


def _execute(client: Client, query: str, parameters: dict[str, object]) -> list[Any]:
    with ledger_errors():
        rows: list[Any] = client.execute(query, parameters)
    return rows
