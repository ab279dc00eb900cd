"""clickhouse-driver against the stack's ClickHouse: whether it behaves as the ledger needs a server to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import UUID

import pytest
from clickhouse_driver.errors import Error, ServerException

from meterline.ledger.client import connect
from meterline.local.ports import Ports
from meterline.local.python_services import ClickHouse
from meterline.local.stack import Stack
from meterline.settings import ClickHouseSettings

pytestmark = pytest.mark.stack

LONG_QUERY = "SELECT count() FROM numbers(10000000000) WHERE NOT ignore(sipHash64(number))"
"""Minutes of work; every test that starts it also ends it."""

VALUES = [
    ("String", "Grüße, 世界\0"),
    ("LowCardinality(String)", "client-1"),
    ("Nullable(String)", None),
    ("Bool", True),
    ("UInt32", 2**32 - 1),
    ("UInt64", 2**64 - 1),
    ("UInt128", 2**96 - 1),
    ("Int64", -(2**63)),
    ("Int64", 2**63 - 1),
    ("Array(String)", ["a", ""]),
    ("Array(UInt64)", []),
    ("Array(Int64)", [-1, 0, 2**63 - 1]),
    ("Map(String, String)", {"model": "large", "": "x"}),
    ("DateTime", datetime(2026, 11, 24, 10, 0, 1)),  # noqa: DTZ001 - the driver reads it without a zone
    ("DateTime64(3, 'UTC')", datetime(2026, 11, 24, 10, 0, 1, 999_000, tzinfo=UTC)),
    ("Date", date(2026, 11, 24)),
    ("Decimal(38, 6)", Decimal("-12345678901234567890.123456")),
    ("UUID", UUID(int=7)),
    ("Tuple(String, UInt64)", ("a", 1)),
]


@pytest.fixture
def client(database):
    with closing_client(database) as client:
        yield client


@contextmanager
def closing_client(settings):
    client = connect(settings)
    try:
        yield client
    finally:
        client.disconnect()


def refusal(client, query, **options):
    with pytest.raises(ServerException) as refused:
        client.execute(query, **options)
    return refused.value.code


@pytest.mark.parametrize(("type_name", "value"), VALUES)
def test_values_come_back_as_they_were_stored(client, type_name, value):
    """Each type the ledger uses, its edges included, through insert and select."""
    client.execute(f"CREATE TABLE t (v {type_name}) ENGINE = MergeTree ORDER BY tuple()")
    client.execute("INSERT INTO t VALUES", [(value,), (value,)])

    assert client.execute("SELECT v FROM t") == [(value,), (value,)]


def test_columns_of_many_rows_come_back(client):
    """More rows than one block holds, a dictionary of 1,000 entries, columnar as the writer inserts."""
    client.execute("CREATE TABLE t (n UInt32, c LowCardinality(String)) ENGINE = MergeTree ORDER BY n")
    numbers = list(range(150_000))
    names = [f"client-{number % 1_000}" for number in numbers]
    client.execute("INSERT INTO t VALUES", [numbers, names], columnar=True)

    assert client.execute("SELECT n, c FROM t ORDER BY n", columnar=True) == [tuple(numbers), tuple(names)]


def test_an_empty_result_has_its_columns(client):
    """Names and types are known without a row."""
    assert client.execute("SELECT 1 AS one, 'x' AS x WHERE 0", with_column_types=True) == (
        [],
        [("one", "UInt8"), ("x", "String")],
    )


def test_parameters_arrive_as_they_are(client):
    """Quotes, backslashes and percent signs of client ids are data."""
    text = "o'Neil \\ 100 % `x` \n"

    assert client.execute("SELECT %(text)s", {"text": text}) == [(text,)]


@pytest.mark.parametrize(
    ("code", "query"),
    [
        (60, "SELECT * FROM no_such_table"),
        (62, "SELEKT 1"),
        (47, "SELECT no_such_column"),
        (81, "SELECT * FROM no_such_database.t"),
        (395, "SELECT throwIf(number = 3000000) FROM numbers(5000000)"),
        (16, "INSERT INTO t (no_such_column) VALUES"),
    ],
)
def test_errors_have_clickhouses_codes_and_leave_the_connection_usable(client, code, query):
    """The codes decide whether work is tried again; after each the same connection goes on."""
    client.execute("CREATE TABLE t (n UInt32) ENGINE = MergeTree ORDER BY n")
    rows = [(1,)] if query.startswith("INSERT") else None

    assert refusal(client, query, params=rows) == code
    assert client.execute("SELECT 1") == [(1,)]


def test_a_query_ends_at_its_time_limit(client):
    """Code 159, soon after the limit, and the connection goes on."""
    started = time.monotonic()
    code = refusal(client, LONG_QUERY, settings={"max_execution_time": 1})

    assert code == 159
    assert time.monotonic() - started < 10
    assert client.execute("SELECT 1") == [(1,)]


def test_a_query_ends_at_its_memory_limit(client):
    """Code 241; the limit belongs to that query alone."""
    query = "SELECT groupArray(number) FROM numbers(20000000)"

    assert refusal(client, query, settings={"max_memory_usage": 10_000_000}) == 241
    assert client.execute("SELECT length(groupArray(number)) FROM numbers(2000000)") == [(2_000_000,)]


def test_a_short_query_does_not_wait_for_a_long_one(client, database):
    """Clients are served beside each other; cancelling ends the long query on the server."""
    tag = f"long {database.database}"
    ended = threading.Event()

    def run_long():
        with closing_client(database) as other:
            try:
                other.execute(LONG_QUERY + f" AND '{tag}' != ''", settings={"max_execution_time": 60})
            except Error:
                ended.set()

    thread = threading.Thread(target=run_long)
    thread.start()
    # Not its DESCRIBE, which the server may ask first.
    running = f"FROM system.processes WHERE query LIKE 'SELECT count() FROM numbers(%{tag}%'"
    wait_for(lambda: client.execute(f"SELECT count() {running}") == [(1,)])
    started = time.monotonic()
    answer = client.execute("SELECT 1")
    waited_s = time.monotonic() - started
    still_running = client.execute(f"SELECT count() {running}")
    client.execute(f"KILL QUERY WHERE query LIKE '%{tag}%' AND query NOT LIKE '%KILL%' SYNC")
    thread.join(30)

    assert answer == [(1,)]
    assert waited_s < 2
    assert still_running == [(1,)]
    assert ended.is_set()


def test_a_client_that_leaves_amid_a_result_holds_nobody_up(client, database):
    """Killed workers leave like this: the rest of the answer can't be sent."""
    for _ in range(3):
        with closing_client(database) as leaving:
            rows = leaving.execute_iter("SELECT number, repeat('x', 1000) FROM numbers(1000000)")
            next(rows)

    assert client.execute("SELECT 1") == [(1,)]


def test_concurrent_inserts_all_arrive(client, database):
    """Eight clients at once, each its own rows: none is lost, none is doubled."""
    client.execute("CREATE TABLE t (writer UInt32, n UInt32) ENGINE = MergeTree ORDER BY n")

    def write(writer):
        with closing_client(database) as other:
            for batch in range(5):
                rows = [(writer, batch * 100 + number) for number in range(100)]
                other.execute("INSERT INTO t VALUES", rows)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert client.execute("SELECT writer, count(), uniqExact(n) FROM t GROUP BY writer ORDER BY writer") == [
        (writer, 500, 500) for writer in range(8)
    ]


def test_an_insert_that_breaks_off_stores_nothing(client):
    """A value the second block can't encode, after the first was sent: no row of the insert is there."""
    client.execute("CREATE TABLE t (n UInt32) ENGINE = MergeTree ORDER BY n")
    with pytest.raises(Exception, match=r"argument|int|format|type"):
        client.execute(
            "INSERT INTO t VALUES",
            [(number,) for number in range(1_000)] + [("no number",)],
            settings={"insert_block_size": 1_000},
        )
    client.disconnect()

    assert client.execute("SELECT count() FROM t") == [(0,)]


@pytest.mark.parametrize(
    ("code", "table", "limits"),
    [
        (469, "(n UInt32, CONSTRAINT small CHECK n < 1000) ENGINE = MergeTree ORDER BY n", {}),
        (395, "(n UInt32, m UInt32 DEFAULT throwIf(n = 1000)) ENGINE = MergeTree ORDER BY n", {}),
        (
            252,
            "(n UInt32) ENGINE = MergeTree PARTITION BY n ORDER BY n",
            {"max_partitions_per_insert_block": 10},
        ),
    ],
)
def test_an_insert_that_the_server_refuses_is_no_success_and_stores_nothing(client, code, table, limits):
    """The rows were all received when the table refuses one: it is told, and none of the others is there."""
    client.execute(f"CREATE TABLE t {table}")
    rows = [(number,) for number in range(1_001)]

    assert refusal(client, "INSERT INTO t (n) VALUES", params=rows, settings=limits) == code
    assert client.execute("SELECT count() FROM t") == [(0,)]


def test_of_an_inserts_data_nothing_is_taken_for_a_cancel(client):
    """Byte 3 is how a client cancels. While megabytes of it arrive the server looks for that many times; of a
    cancelled query the refusal would not be told.
    """
    client.execute("CREATE TABLE t (a String, CONSTRAINT empty CHECK a = '') ENGINE = MergeTree ORDER BY a")
    column = [1_000 * "\x03"] * 20_000

    assert refusal(client, "INSERT INTO t VALUES", params=[column], columnar=True) == 469


def test_acknowledged_inserts_survive_a_killed_server(tmp_path):
    """SIGKILL amid inserts: every acknowledged batch is there; the one under way is whole or absent."""
    ports = Ports.free()
    stack = Stack(tmp_path / "stack", ports, [ClickHouse(tmp_path / "stack" / "clickhouse", ports)])
    settings = ClickHouseSettings(port=ports.clickhouse, database="default")
    acknowledged = []

    def write():
        with closing_client(settings) as writer, suppress(Error, OSError, EOFError):
            for batch in range(100_000):
                writer.execute("INSERT INTO t VALUES", [(batch, number) for number in range(200)])
                acknowledged.append(batch)

    try:
        stack.up()
        with closing_client(settings) as client:
            client.execute("CREATE TABLE t (batch UInt32, n UInt32) ENGINE = MergeTree ORDER BY (batch, n)")
        thread = threading.Thread(target=write)
        thread.start()
        wait_for(lambda: len(acknowledged) >= 30)
        os.kill(stack.status()[0].pid, signal.SIGKILL)
        thread.join(60)
        assert stack.up() == ["clickhouse"]
        with closing_client(settings) as client:
            stored = Counter(dict(client.execute("SELECT batch, count() FROM t GROUP BY batch")))
    finally:
        stack.down(wipe=True)

    assert set(acknowledged) - set(stored) == set()
    assert set(stored) - set(acknowledged) <= {len(acknowledged)}
    assert set(stored.values()) == {200}


def test_http_answers_as_the_servers_does(settings, stack):
    """Health checks and curl use /ping."""
    if stack.local is None:
        pytest.skip("the image's own HTTP interface is not ours to test")
    import urllib.request  # noqa: PLC0415 - only here

    address = f"http://{settings.clickhouse.host}:{stack.local.ports.clickhouse_http}/ping"
    with closing(urllib.request.urlopen(address, timeout=5)) as answer:
        assert (answer.status, answer.read()) == (200, b"Ok.\n")


def wait_for(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.02)
