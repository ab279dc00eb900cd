"""docs/ledger.md is true: every query on it runs and answers, and its columns are the views' columns."""

from __future__ import annotations

import asyncio
import re
from decimal import Decimal
from pathlib import Path

import pytest
from tests.ledger_rows import HOUR_MS, NOON, columns_of, event, snapshot, step

from meterline.ledger.client import connect
from meterline.ledger.migrate import apply_migrations
from meterline.ledger.tables import EVENTS, USAGE_RECORD_LOG, WINDOW_SNAPSHOTS
from meterline.ledger.writer import LedgerWriter

pytestmark = pytest.mark.stack

PAGE = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text()
QUERIES = re.findall(r"^```sql\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
VIEWS = (
    "usage",
    "usage_by_hour",
    "windows",
    "usage_records",
    "billing_periods",
    "billing_orders",
    "credit_grants",
    "quota_changes",
    "repairs",
)

CREDIT = 1_000_000

ROWS = {
    EVENTS: [
        event(1, correlation_id="task-17", credits_micro=3 * CREDIT),
        event(2, occurred_at=NOON + 1, sku="cpu", credits_micro=CREDIT // 4),
        event(3, occurred_at=NOON + 2, billable=False),
        # The same event again at another offset, beyond the dedupe horizon: a twin.
        event(4, occurred_at=NOON + HOUR_MS, event_id="event-2", sku="cpu", credits_micro=CREDIT // 4),
        # Half of task-17 is taken back; it arrives two hours late.
        event(
            5,
            occurred_at=NOON + 3,
            correlation_id="task-17",
            credits_micro=-CREDIT,
            appended_at=NOON + 3 + 2 * HOUR_MS,
            corrects_event_id="event-1",
            corrects_kind="amend",
        ),
        event(6, client_id="other", credits_micro=CREDIT),
    ],
    # The statement about noon says one micro-credit more than the rows: drift that must be found.
    WINDOW_SNAPSHOTS: [
        snapshot(NOON, 5, {"gpu": 2 * CREDIT, "cpu": CREDIT // 4 + 1}),
        snapshot(NOON, 6, {"gpu": CREDIT}, client_id="other"),
    ],
    USAGE_RECORD_LOG: [
        step(1, "advance", identifier="id-1", credits_micro=2_250_000, value=2),
        step(2, "record", identifier="id-1", value=2, state="intent"),
        step(3, "attempt", identifier="id-1"),
        step(4, "outcome", identifier="id-1", state="accepted"),
        step(5, "held", window_id="later", state="held"),
    ],
}

QUARTER = Decimal("0.25")

ANSWERS = [
    # (which columns are looked at, their rows), in the order of the page.
    # A receipt for a day: the four billable lines of acme, in order of time.
    (slice(1, 3), [("gpu", 3), ("cpu", QUARTER), ("gpu", -1), ("cpu", QUARTER)]),
    # One task: 3 credits, 1 taken back.
    (slice(None), [("gpu", 2, 2, 1)]),
    # The largest clients of a month.
    (slice(None), [("acme", Decimal("2.5"), "gpu"), ("other", 1, "gpu")]),
    # Late arrivals.
    (slice(None), [("acme", 1, -1, 7_200, 0)]),
    # Twins.
    (slice(3), [("acme", "event-2", 2)]),
    # A month by day: the twin's hour has no closed window.
    (slice(1, None), [(4, Decimal("2.5"), False)]),
    # Drift between rows and statements.
    (slice(2, None), [(Decimal("2.250001"), Decimal("2.25"))]),
    # A billing period.
    (slice(None), [("credits", Decimal("2.25"), 2, 0, 1, 0)]),
]


@pytest.fixture(scope="module")
def analyst(stack):
    """A client on a ledger that holds something for every query."""
    own = stack.settings.clickhouse.model_copy(update={"database": "docs_ledger"})
    apply_migrations(own)

    async def fill():
        writer = LedgerWriter(own)
        for table, rows in ROWS.items():
            await writer.insert(table, *columns_of(rows))
            await writer.insert(table, *columns_of(rows))  # a repeated write must change no answer
        await writer.close()

    asyncio.run(fill())
    client = connect(own)
    yield client
    client.execute("DROP DATABASE docs_ledger")
    client.disconnect()


def test_every_query_has_its_expected_answer():
    """A query that is added to the page needs an answer here."""
    assert len(QUERIES) == len(ANSWERS)


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_a_query_of_the_page_answers(analyst, number):
    """Copied from the page to a client, it runs and says what is in the ledger."""
    columns, expected = ANSWERS[number]
    rows = analyst.execute(QUERIES[number])

    assert [row[columns] for row in rows] == expected


@pytest.mark.parametrize("view", VIEWS)
def test_the_columns_of_a_view_are_those_on_the_page(analyst, view):
    """The page is the contract: no column is missing on it, and none is invented."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"`{view}`")]
    documented = {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    columns = {name for name, *_ in analyst.execute(f"DESCRIBE TABLE {view}")}

    assert documented == columns
