"""What the audit for twins asks the ledger: events of which more than one copy was accepted.

Blocks, and raises what `ledger.client.ledger_errors` raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from meterline.domain.twins import Copy
from meterline.ledger.client import Client, ledger_errors

__all__ = ["copied_events"]

IDENTITIES_PER_QUERY_MAX = 5_000_000
"""Grouping takes the server about 200 bytes for each identity: a gigabyte, whatever the ledger's size."""
COPIES_PER_BLOCK = 10_000
"""A topic that was published twice has as many twins as events: they are read a few megabytes at a time."""

_COPIES = """
    SELECT client_id, event_id, toUnixTimestamp64Milli(appended_at), topic_id, `partition`, `offset`,
           payload_digest, correlation_id, sku, credits_micro, billable, toUnixTimestamp64Milli(occurred_at),
           (client_id, topic_id, `partition`, `offset`) IN
           (
               SELECT client_id, corrects_topic_id, corrects_partition, corrects_offset FROM events
               WHERE appended_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC') AND corrects_event_id != ''
           )
    FROM events
    WHERE appended_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC') AND identity_hash IN
    (
        SELECT identity_hash FROM events
        WHERE appended_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC')
          AND identity_hash %% %(slices)s = %(slice)s
        GROUP BY identity_hash
        -- Not count(): a row that was inserted again is no second copy.
        HAVING min(`offset`) != max(`offset`) OR min(`partition`) != max(`partition`)
            OR min(topic_id) != max(topic_id)
    )
    ORDER BY client_id, event_id
    LIMIT 1 BY topic_id, `partition`, `offset`
"""


def copied_events(client: Client, appended_since_ms: int) -> Iterator[list[Copy]]:
    """The copies of each event that was accepted more than once, read while they are consumed.

    Corrections are events, too: one that was accepted twice is among them.

    Args:
        client: can do nothing else until the iterator is exhausted.
        appended_since_ms: of all copies that count, and of the corrections that name them.
    """
    with ledger_errors():
        ((rows,),) = client.execute(
            "SELECT count() FROM events WHERE appended_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC')",
            {"since": appended_since_ms},
        )
        slices = rows // IDENTITIES_PER_QUERY_MAX + 1
        for number in range(slices):
            found = client.execute_iter(
                _COPIES,
                {"since": appended_since_ms, "slices": slices, "slice": number},
                settings={"max_block_size": COPIES_PER_BLOCK},
            )
            for _, copies in groupby(map(_copy, found), key=lambda copy: (copy.client_id, copy.event_id)):
                yield list(copies)


def _copy(row: tuple[object, ...]) -> Copy:
    *values, is_corrected = row
    return Copy._make([*values, bool(is_corrected)])  # the columns are in its order
