"""What the check of credit buckets asks the ledger: lifetime sums, and work that no reservation covers.

Sums are taken with FINAL from the events themselves, in another way than metering's own queries do. All
functions block and raise what `ledger.client.ledger_errors` raises. Times are milliseconds, UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

from meterline.ledger.client import Client, ledger_errors

__all__ = [
    "LifetimeSum",
    "UnreservedUsage",
    "busiest_minutes",
    "lifetime_sums",
    "positions_present",
    "reserved_usage",
    "source_partitions",
    "unreserved_usage",
]

CLIENTS_PER_QUERY_MAX = 250
"""Ids of 200 bytes, written twice and escaped, stay below the 256 KiB a server takes as a query."""
POSITIONS_PER_QUERY_MAX = 2_000
"""Likewise: topic id, partition and offset in 50 bytes or less."""
IDS_PER_QUERY_MAX = 500
"""Likewise, reservation ids."""
EXAMPLES_MAX = 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LifetimeSum:
    """What the ledger holds of a client from one source partition."""

    events: int = 0
    credits_micro: int = 0
    free_events: int = 0
    free_credits_micro: int = 0


@dataclass(frozen=True, slots=True)
class UnreservedUsage:
    """Billable work of one client that named no reservation; corrections are none."""

    client_id: str
    events: int
    credits_micro: int
    first_at: datetime
    last_at: datetime
    examples: Sequence[str]
    """Ids of some of the events."""


def source_partitions(client: Client) -> dict[tuple[str, int], int]:
    """How many rows there are of each source partition, copies included."""
    rows = _execute(
        client, "SELECT topic_id, `partition`, count() FROM events GROUP BY topic_id, `partition`"
    )
    return {(topic_id, partition): count for topic_id, partition, count in rows}


def lifetime_sums(
    client: Client, source: tuple[str, int], offset_max: int, later: Mapping[str, int]
) -> dict[str, LifetimeSum]:
    """What every client used from one source partition.

    Args:
        source: topic id and partition.
        offset_max: the last offset that counts, except for the clients in
        later: client -> the last offset that counts, above `offset_max`.
    """
    sums = _sums(client, source, "`offset` <= %(offset_max)s", {"offset_max": offset_max})
    for group in _groups(later.items(), CLIENTS_PER_QUERY_MAX):
        ids, cutoffs = [client_id for client_id, _ in group], [cutoff for _, cutoff in group]
        sums |= _sums(
            client,
            source,
            "client_id IN %(ids)s"
            " AND `offset` <= transform(toString(client_id), %(ids)s, %(cutoffs)s, toInt64(-1))",
            {"ids": ids, "cutoffs": cutoffs},
        )
    return sums


def positions_present(
    client: Client, client_id: str, positions: Iterable[tuple[str, int, int]], appended_since: int
) -> set[tuple[str, int, int]]:
    """Those of the positions (topic id, partition, offset) at which the ledger has an event of the client."""
    found: set[tuple[str, int, int]] = set()
    for group in _groups(positions, POSITIONS_PER_QUERY_MAX):
        found.update(
            _execute(
                client,
                """
                SELECT topic_id, `partition`, `offset` FROM events
                WHERE client_id = %(client_id)s
                  AND appended_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC')
                  AND (topic_id, `partition`, `offset`) IN %(positions)s
                """,
                {"client_id": client_id, "since": appended_since, "positions": list(group)},
            )
        )
    return found


def reserved_usage(
    client: Client, client_id: str, reservation_ids: Iterable[str], appended_since: int
) -> dict[str, tuple[int, int]]:
    """Billable events and micro-credits of some reservations; those without any are left out."""
    found: dict[str, tuple[int, int]] = {}
    for group in _groups(reservation_ids, IDS_PER_QUERY_MAX):
        rows = _execute(
            client,
            """
            SELECT reservation_id, count(), sum(credits_micro) FROM events FINAL
            WHERE client_id = %(client_id)s AND billable AND reservation_id IN %(ids)s
              AND appended_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC')
            GROUP BY reservation_id
            SETTINGS do_not_merge_across_partitions_select_final = 1
            """,
            {"client_id": client_id, "ids": list(group), "since": appended_since},
        )
        found |= {reservation_id: (events, charged) for reservation_id, events, charged in rows}
    return found


def unreserved_usage(client: Client, since: Mapping[str, int]) -> list[UnreservedUsage]:
    """Of each client what was appended since then without a reservation; clients without any are left out."""
    found = []
    for group in _groups(sorted(since.items()), CLIENTS_PER_QUERY_MAX):
        rows = _execute(
            client,
            f"""
            SELECT client_id, count(), sum(toInt128(credits_micro)), min(occurred_at), max(occurred_at),
                   groupArraySorted({EXAMPLES_MAX})(event_id)
            FROM events FINAL
            WHERE client_id IN %(ids)s AND billable AND reservation_id IS NULL AND corrects_event_id = ''
              AND appended_at >= fromUnixTimestamp64Milli(
                  transform(toString(client_id), %(ids)s, %(times)s, toInt64(0)), 'UTC')
            GROUP BY client_id ORDER BY client_id
            SETTINGS do_not_merge_across_partitions_select_final = 1
            """,  # noqa: S608 - only the constant above is put in
            {"ids": [client_id for client_id, _ in group], "times": [time for _, time in group]},
        )
        found += [UnreservedUsage(*row) for row in rows]
    return found


def busiest_minutes(client: Client, client_ids: Iterable[str], since: int) -> dict[str, int]:
    """The most micro-credits each client used in one minute (of `occurred_at`); without any: left out."""
    found: dict[str, int] = {}
    for group in _groups(client_ids, CLIENTS_PER_QUERY_MAX):
        rows = _execute(
            client,
            """
            SELECT client_id, max(charged) FROM
            (
                SELECT client_id, toStartOfMinute(occurred_at) AS minute,
                       sum(toInt128(credits_micro)) AS charged
                FROM events FINAL
                WHERE client_id IN %(ids)s AND billable
                  AND occurred_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC')
                GROUP BY client_id, minute
                SETTINGS do_not_merge_across_partitions_select_final = 1
            )
            GROUP BY client_id
            """,
            {"ids": list(group), "since": since},
        )
        found |= dict(rows)
    return found


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def _sums(
    client: Client, source: tuple[str, int], condition: str, parameters: dict[str, object]
) -> dict[str, LifetimeSum]:
    rows = _execute(
        client,
        f"""
        SELECT client_id,
               countIf(billable), sumIf(toInt128(credits_micro), billable),
               countIf(NOT billable), sumIf(toInt128(credits_micro), NOT billable)
        FROM events FINAL
        WHERE topic_id = %(topic_id)s AND `partition` = %(partition)s AND {condition}
        GROUP BY client_id
        SETTINGS do_not_merge_across_partitions_select_final = 1
        """,  # noqa: S608 - one of the two conditions above
        {"topic_id": source[0], "partition": source[1], **parameters},
    )
    return {client_id: LifetimeSum(*sums) for client_id, *sums in rows}


def _execute(client: Client, query: str, parameters: dict[str, object] | None = None) -> list[Any]:
    with ledger_errors():
        rows: list[Any] = client.execute(query, parameters or {})
    return rows
