"""The ledger on ClickHouse: a row that is inserted again is the same row, and nothing acknowledged is lost.

What must hold right after an insert must hold after a merge too, so most rules are proved at both moments.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import astuple
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from tests.ledger_rows import HOUR_MS, NOON, columns_of, event, snapshot, step

from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SkuTotal, WindowRef
from meterline.errors import WorkerMustExit
from meterline.ledger.client import LedgerNotMigrated, connect
from meterline.ledger.migrate import MIGRATIONS_DIR, apply_migrations, list_migrations
from meterline.ledger.queries import (
    DedupePage,
    dedupe_pages,
    dedupe_rows,
    kept_windows,
    last_offset,
    partition_offsets,
    window_sums,
)
from meterline.ledger.repair_queries import state_windows, told_windows
from meterline.ledger.tables import EVENTS, USAGE_RECORD_LOG, WINDOW_SNAPSHOTS
from meterline.ledger.writer import LedgerWriter
from meterline.local.ports import Ports
from meterline.local.python_services import ClickHouse
from meterline.local.stack import Stack
from meterline.settings import ClickHouseSettings

pytestmark = pytest.mark.stack

WINDOW = WindowRef("acme", NOON, NOON + HOUR_MS, "topic", 0)


@pytest.fixture
def client(ledger):
    client = connect(ledger)
    yield client
    client.disconnect()


def insert(settings, table, *batches):
    """Through the pipeline's own writer, one call a batch."""

    async def run():
        writer = LedgerWriter(settings)
        try:
            for rows in batches:
                await writer.insert(table, *columns_of(rows))
        finally:
            await writer.close()

    asyncio.run(run())


def identities(lows, highs, *_):
    """The identity hashes among the columns of `dedupe_rows`."""
    return [high << 64 | low for low, high in zip(lows.tolist(), highs.tolist(), strict=True)]


@pytest.fixture(params=["right after the insert", "after a merge"])
def settled(request, client):
    """Call it between inserting and asking: the answers may not depend on whether parts were merged."""

    def settle():
        if request.param == "after a merge":
            for table in (EVENTS, WINDOW_SNAPSHOTS, USAGE_RECORD_LOG):
                client.execute(f"OPTIMIZE TABLE {table} FINAL")

    return settle


def test_migrating_twice_is_harmless(database):
    """The first time all are applied, the second time none; both end in the same schema."""
    pending = [migration.state for migration in list_migrations(database)]
    first = apply_migrations(database)
    again = apply_migrations(database)

    assert set(pending) == {"pending"}
    assert len(first) == len(pending) == len(list(MIGRATIONS_DIR.glob("*.sql")))
    assert again == []
    assert {migration.state for migration in list_migrations(database)} == {"applied"}


def test_an_unmigrated_ledger_is_told_apart(database):
    """A worker must end with the remedy, not wait for tables that nobody makes."""
    with pytest.raises(LedgerNotMigrated, match="meterline migrate"):
        insert(database, EVENTS, [event(1)])


def test_every_column_comes_back_as_it_was_written(client, ledger):
    """A receipt shows what the producer sent, to the byte."""
    row = event(
        7,
        client_id="Grüße",
        credits_micro=-(2**62),
        billable=False,
        occurred_at=NOON + 1,
        attributes={"model": "large", "": "\0"},
        reservation_id="r-1",
        corrects_event_id="event-3",
        corrects_kind="void",
        corrects_topic_id="topic",
        corrects_partition=3,
        corrects_offset=2**40,
        identity_hash=2**96 - 1,
        payload_digest=2**64 - 1,
    )
    insert(ledger, EVENTS, [row])
    names, _ = columns_of([row])
    (stored,) = client.execute(f"SELECT {', '.join(f'`{name}`' for name in names)} FROM events")
    at = {name: datetime.fromtimestamp(row[name] / 1000, UTC) for name in ("occurred_at", "appended_at")}

    assert dict(zip(names, stored, strict=True)) == row | at


def test_rows_that_are_inserted_again_count_once(client, ledger, settled):
    """A crash after the insert and before the commit repeats it, in other batches and with more behind it."""
    rows = [event(offset, credits_micro=offset) for offset in range(1, 101)]
    insert(ledger, EVENTS, rows[:60], rows[:60], rows[30:], rows[90:] + rows[:5])
    settled()

    assert partition_offsets(client, "topic", 0) == (100, 1, 100)
    assert last_offset(client, "topic", 0) == 100
    assert window_sums(client, [(WINDOW, 100)]) == [{"gpu": SkuTotal(100, 5_050)}]
    assert kept_windows(client, "topic", 0, 100, NOON, WindowLengths.of(HOUR_MS)) == [
        (NOON, "acme", "gpu", 100, 5_050, 0, 0)
    ]
    pages = dedupe_pages(client, "topic", 0, 100, NOON, 40)
    assert [page[:2] for page in pages] == [(1, 39), (40, 79), (80, 100)]
    assert set().union(*(identities(*dedupe_rows(client, "topic", 0, page)) for page in pages)) == {
        row["identity_hash"] for row in rows
    }
    assert client.execute("SELECT count(), sum(credits) FROM usage") == [(100, Decimal("0.00505"))]
    assert client.execute("SELECT events, credits FROM usage_by_hour") == [(100, Decimal("0.00505"))]


def test_twins_both_stay(client, ledger, settled):
    """The same event at two offsets is two rows whatever merges do; the audit reverses the later one."""
    twin = {"event_id": "e", "identity_hash": 5, "payload_digest": 6}
    insert(ledger, EVENTS, [event(1, **twin)], [event(2, **twin)], [event(1, partition=1, **twin)])
    settled()

    assert client.execute("SELECT `partition`, `offset` FROM usage WHERE event_id = 'e' ORDER BY ALL") == [
        (0, 1),
        (0, 2),
        (1, 1),
    ]
    assert window_sums(client, [(WINDOW, 2)]) == [{"gpu": SkuTotal(2, 2_000_000)}]


def test_window_sums_end_at_the_cutoff(client, ledger, settled):
    """Only this client, window and source partition, up to this offset; billable and free apart."""
    insert(
        ledger,
        EVENTS,
        [
            event(1),
            event(2, occurred_at=NOON + HOUR_MS - 1, sku="cpu", credits_micro=5),
            event(3, billable=False, credits_micro=7),
            event(4, credits_micro=-3),
            event(5),  # behind the cutoff
            event(2, partition=1),
            event(2, topic_id="recreated"),
            event(6, occurred_at=NOON - 1),
            event(7, occurred_at=NOON + HOUR_MS),
            event(8, client_id="other", credits_micro=9),
        ],
    )
    settled()
    other = WindowRef("other", NOON, NOON + HOUR_MS, "topic", 0)
    nobody = WindowRef("nobody", NOON, NOON + HOUR_MS, "topic", 0)
    asked = [(other, 8), (WINDOW, 4), (nobody, 8), (WINDOW, 1), (other, 7)]

    assert window_sums(client, asked) == [
        {"gpu": SkuTotal(1, 9)},
        {"gpu": SkuTotal(2, 999_997, 1, 7), "cpu": SkuTotal(1, 5)},
        {},
        {"gpu": SkuTotal(1, 1_000_000)},
        {},
    ]


def test_dedupe_rows_end_at_the_applied_offset_and_the_horizon(client, ledger, settled):
    """Rows above it belong to a flush that did not commit: taken for known they would swallow themselves."""
    insert(
        ledger,
        EVENTS,
        [
            event(1, appended_at=NOON - 1),
            event(2, appended_at=NOON),
            event(3),
            event(4),
            event(3, partition=1),
        ],
    )
    settled()
    pages = dedupe_pages(client, "topic", 0, 3, NOON, 100)
    assert pages == [DedupePage(2, 3, NOON, NOON + 1_000)]
    lows, highs, digests, appended = dedupe_rows(client, "topic", 0, *pages)
    hashes = identities(lows, highs)

    assert sorted(zip(hashes, digests.tolist(), appended.tolist(), strict=True)) == [
        ((1 << 95) + 2, (1 << 63) + 2, NOON),
        ((1 << 95) + 3, (1 << 63) + 3, NOON + 1_000),
    ]
    assert dedupe_pages(client, "topic", 9, 3, NOON, 100) == []
    assert [column.tolist() for column in dedupe_rows(client, "topic", 9, *pages)] == [[]] * 4
    assert window_sums(client, [(WINDOW, 3)]) == [{"gpu": SkuTotal(3, 3_000_000)}]  # read as ever, afterwards


def test_partition_offsets_of_an_empty_partition_are_none(client):
    """A new partition has no rows; zero would be an offset."""
    assert partition_offsets(client, "topic", 0) is None
    assert last_offset(client, "topic", 0) is None


def test_kept_windows_by_start_client_and_sku(client, ledger, settled):
    """What the restarted worker's state must equal, window by window."""
    insert(
        ledger,
        EVENTS,
        [
            event(1),
            event(2, occurred_at=NOON + HOUR_MS),
            event(3, client_id="other", billable=False),
            event(4, occurred_at=NOON - 1),
            event(5),
        ],
    )
    settled()

    assert sorted(kept_windows(client, "topic", 0, 4, NOON, WindowLengths.of(HOUR_MS))) == [
        (NOON, "acme", "gpu", 1, 1_000_000, 0, 0),
        (NOON, "other", "gpu", 0, 0, 1, 1_000_000),
        (NOON + HOUR_MS, "acme", "gpu", 1, 1_000_000, 0, 0),
    ]


def test_windows_of_several_lengths_are_added_up_each_in_its_own(client, ledger, settled):
    """Before a change an hour, then ten minutes, then two hours; the repair's question says the same."""
    lengths = WindowLengths.of(HOUR_MS).changed(HOUR_MS // 6, NOON + HOUR_MS, 0)
    lengths = lengths.changed(2 * HOUR_MS, NOON + 2 * HOUR_MS, 0)
    minutes = {1: 59, 2: 60, 3: 69, 4: 70, 5: 119, 6: 120, 7: 239, 8: 240}
    insert(ledger, EVENTS, [event(o, occurred_at=NOON + m * 60_000) for o, m in minutes.items()])
    settled()

    counts = {0: 1, 60: 2, 70: 1, 110: 1, 120: 2, 240: 1}
    sums = {NOON + start * 60_000: SkuTotal(n, n * 1_000_000) for start, n in counts.items()}
    kept = kept_windows(client, "topic", 0, 8, NOON, lengths)
    assert sorted(kept) == [(start, "acme", "gpu", *astuple(total)) for start, total in sums.items()]
    windows = state_windows(client, "topic", 0, 8, lengths, 0)
    assert {start: window.skus for (start, _), window in windows.items()} == {
        start: {"gpu": total} for start, total in sums.items()
    }


def test_told_windows_are_the_newest_snapshots(client, ledger, settled):
    """Of one partition and a span of windows: with all four sums of each SKU."""
    newest = snapshot(NOON, 20, {"gpu": 7, "cpu": 1}, free_counts=[3, 0], free_credits_micro=[9, 0])
    others = snapshot(NOON + HOUR_MS, 25, {"gpu": 2}), snapshot(NOON, 30, {"gpu": 5}, partition=1)
    insert(ledger, WINDOW_SNAPSHOTS, [snapshot(NOON, 10, {"gpu": 5}), newest, *others])
    settled()

    assert told_windows(client, "topic", 0, NOON - HOUR_MS, NOON) == {
        (NOON, "acme"): (20, {"gpu": SkuTotal(1, 7, 3, 9), "cpu": SkuTotal(1, 1)})
    }


def test_the_latest_snapshot_of_a_window_stands(client, ledger, settled):
    """By cutoff, not by arrival; an older statement that comes late or again changes nothing."""
    old, new = snapshot(NOON, 10, {"gpu": 5}), snapshot(NOON, 20, {"gpu": 7, "cpu": 1}, closed_at=NOON * 2)
    insert(ledger, WINDOW_SNAPSHOTS, [new], [old], [old, new])
    settled()

    assert client.execute(
        "SELECT cutoff_offset, events, credits, skus, snapshots, first_closed_at < closed_at FROM windows"
    ) == [(20, 2, Decimal("0.000008"), ["gpu", "cpu"], 2, 1)]


def test_of_two_statements_with_one_cutoff_both_are_kept(client, ledger, settled):
    """They must never differ; if they do, the first in the log stands and the other can be found."""
    first, second = snapshot(NOON, 10, {"gpu": 5}, log_offset=1), snapshot(NOON, 10, {"gpu": 6}, log_offset=2)
    insert(ledger, WINDOW_SNAPSHOTS, [second, first])
    settled()

    assert client.execute("SELECT credits_micro FROM windows") == [([5],)]
    assert client.execute("SELECT count() FROM window_snapshots FINAL") == [(2,)]


def test_an_hour_is_closed_when_all_its_windows_are(client, ledger, settled):
    """Open: no snapshot, or one of two partitions without; closed: every event's window was published."""
    insert(
        ledger,
        EVENTS,
        [
            event(1),
            event(2, occurred_at=NOON + HOUR_MS),
            event(3, occurred_at=NOON + 2 * HOUR_MS),
            event(1, occurred_at=NOON + HOUR_MS, partition=1),
        ],
    )
    insert(
        ledger,
        WINDOW_SNAPSHOTS,
        [snapshot(NOON, 1, {"gpu": 1_000_000}), snapshot(NOON + HOUR_MS, 2, {"gpu": 1_000_000})],
    )
    settled()
    query = "SELECT toHour(hour), events, closed FROM usage_by_hour ORDER BY hour"

    assert client.execute(query) == [(12, 1, True), (13, 2, False), (14, 1, False)]

    insert(ledger, WINDOW_SNAPSHOTS, [snapshot(NOON + HOUR_MS, 1, {"gpu": 1_000_000}, partition=1)])

    assert client.execute(query) == [(12, 1, True), (13, 2, True), (14, 1, False)]


def test_short_windows_close_an_hour_when_the_watermark_has_passed_it(client, ledger, settled):
    """Half an hour published is not an hour closed."""
    half = {"window_end": NOON + HOUR_MS // 2, "watermark": NOON + HOUR_MS // 2}
    insert(ledger, EVENTS, [event(1)])
    insert(ledger, WINDOW_SNAPSHOTS, [snapshot(NOON, 1, {"gpu": 1}, **half)])
    settled()
    before = client.execute("SELECT closed FROM usage_by_hour")
    later = {"window_end": NOON + HOUR_MS, "watermark": NOON + HOUR_MS, "client_id": "other"}
    insert(ledger, WINDOW_SNAPSHOTS, [snapshot(NOON + HOUR_MS // 2, 2, {"gpu": 1}, **later)])

    assert before == [(False,)]
    assert client.execute("SELECT closed FROM usage_by_hour") == [(True,)]


def test_a_usage_record_is_one_line_with_where_it_stands(client, ledger, settled):
    """Record, attempt and outcome of one identifier; again inserted steps count once."""
    told = {"identifier": "id-1", "stripe_customer": "cus_1", "event_name": "credits", "value": 17}
    rows = [
        step(1, "advance", credits_micro=17_250_000, **told),
        step(2, "record", state="intent", event_timestamp=NOON // 1000, **told),
        step(3, "attempt", first_attempt_at=NOON + 5, **told),
        step(4, "outcome", state="accepted", request_id="req_1", **told),
    ]
    insert(ledger, USAGE_RECORD_LOG, rows[:3], rows)
    settled()

    assert client.execute(
        "SELECT identifier, credits, value, state, attempts, request_id, last_seq FROM usage_records"
    ) == [("id-1", Decimal("17.25"), 17, "accepted", 1, "req_1", 4)]


def test_a_step_of_the_later_owner_replaces_the_stalled_ones(client, ledger, settled):
    """Whoever fenced the partition last decides what step `seq` was, whichever arrives later."""
    stalled = step(1, "record", identifier="id-stale", state="intent", generation=1)
    owner = step(1, "record", identifier="id-own", state="intent", generation=2)
    insert(ledger, USAGE_RECORD_LOG, [owner], [stalled])
    settled()

    assert client.execute("SELECT identifier FROM usage_records") == [("id-own",)]


def test_usage_older_than_the_billing_horizon_is_flagged(client, ledger):
    """Accepted, listed, billed in the current period: 35 days, measured at the broker's append time."""
    day = 24 * HOUR_MS
    insert(ledger, EVENTS, [event(1, appended_at=NOON + 35 * day), event(2, appended_at=NOON + 35 * day + 1)])

    assert client.execute("SELECT `offset`, beyond_billing_horizon FROM usage ORDER BY `offset`") == [
        (1, False),
        (2, True),
    ]


def test_many_concurrent_callers_are_each_answered(client, ledger):
    """Group commit: two hundred waiting callers need few inserts, and each row is stored once."""

    async def run():
        writer = LedgerWriter(ledger)
        try:
            await asyncio.gather(
                *(writer.insert(EVENTS, *columns_of([event(offset)])) for offset in range(1, 201))
            )
        finally:
            await writer.close()

    asyncio.run(run())
    ((parts,),) = client.execute(
        "SELECT count() FROM system.parts"
        " WHERE database = currentDatabase() AND table = 'events' AND level = 0"
    )

    assert partition_offsets(client, "topic", 0) == (200, 1, 200)
    assert parts < 20


def test_rows_that_do_not_fit_end_the_worker(ledger):
    """Trying again for ever would hide a defect; the error says which value."""
    with pytest.raises(WorkerMustExit, match="do not fit the table"):
        insert(ledger, EVENTS, [event(1, credits_micro=2**63)])


def test_the_writer_waits_for_a_killed_server_and_delivers(tmp_path):
    """SIGKILL, then new rows: the callers wait without an error; after the restart each row is there once."""
    ports = Ports.free()
    stack = Stack(tmp_path / "stack", ports, [ClickHouse(tmp_path / "stack" / "clickhouse", ports)])
    settings = ClickHouseSettings(port=ports.clickhouse)

    async def outage():
        writer = LedgerWriter(settings)
        try:
            await writer.insert(EVENTS, *columns_of([event(1)]))
            os.kill(stack.status()[0].pid, signal.SIGKILL)
            waiting = [
                asyncio.create_task(writer.insert(EVENTS, *columns_of([event(offset)])))
                for offset in (1, 2, 3)
            ]
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(waiting[0]), 1.0)
            undecided = [task.done() for task in waiting]
            await asyncio.to_thread(stack.up)
            await asyncio.wait_for(asyncio.gather(*waiting), 30)
            return undecided
        finally:
            await writer.close()

    try:
        stack.up()
        apply_migrations(settings)
        undecided = asyncio.run(outage())
        client = connect(settings)
        stored = partition_offsets(client, "topic", 0)
        client.disconnect()
    finally:
        stack.down(wipe=True)

    assert undecided == [False, False, False]
    assert stored == (3, 1, 3)


def test_closing_frees_whoever_still_waits():
    """A worker that ends in an outage ends at once, and its caller is not told that anything was stored."""

    async def run():
        writer = LedgerWriter(ClickHouseSettings(port=Ports.free().clickhouse))
        waiting = asyncio.create_task(writer.insert(EVENTS, *columns_of([event(1)])))
        await asyncio.sleep(0.2)
        await writer.close()
        with pytest.raises(WorkerMustExit, match="closed"):
            await waiting

    asyncio.run(run())


def test_closing_while_the_connection_breaks_off_ends_in_peace(ledger):
    """The thread that inserts puts a broken connection away itself, perhaps at this very moment."""

    async def run():
        writer = LedgerWriter(ledger)
        await writer.insert(EVENTS, *columns_of([event(1)]))
        connection = writer._client.connection
        connected = connection.socket

        class Breaking:
            def shutdown(self, _how):
                connected.close()
                connection.reset_state()

        connection.socket = Breaking()
        await writer.close()

    asyncio.run(run())
