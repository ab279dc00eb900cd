"""Events that were counted twice are taken back, once: by real workers, from a real log."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from tests.pipeline_books import WORKER_SETTINGS, client_books
from tests.stacks import own_stack
from tests.worker_processes import WorkerProcess, ended_in_the_end, until

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import event_to_record
from meterline.contracts.topics import USAGE_EVENTS
from meterline.domain.events import UsageEvent

pytestmark = [pytest.mark.stack, pytest.mark.timeout(200)]

DAY_MS = 86_400_000
CREDIT = 1_000_000

stack = own_stack()
"""Of one topic the kind of times is changed."""


@pytest.fixture
def worker(stack, tmp_path):
    made = WorkerProcess("metering", stack.process_environment() | WORKER_SETTINGS, tmp_path)
    with ended_in_the_end(made):
        made.start_ready()
        yield made


@pytest.fixture
def append_at(stack):
    """Append a record to a partition at a time of the test's choosing: the broker's clock can't be moved, but
    the topic can take the times it is given.
    """
    kafka = stack.settings.kafka.client_config()
    admin, producer = AdminClient(kafka), Producer(kafka)

    def take_times(kind):
        entry = ConfigEntry("message.timestamp.type", kind, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, USAGE_EVENTS, incremental_configs=[entry])
        for done in admin.incremental_alter_configs([resource]).values():
            done.result(30)

    codec = RecordCodec("usage-event")

    def append(event, partition, timestamp):
        value = codec.encode(event_to_record(event))
        producer.produce(USAGE_EVENTS, value, event.client_id.encode(), partition, timestamp=timestamp)
        assert producer.flush(30) == 0

    take_times("CreateTime")
    yield append
    take_times("LogAppendTime")


@pytest.fixture
def clickhouse(stack):
    settings = stack.settings.clickhouse
    with ClickHouse(settings.host, settings.port, settings.database) as client:
        yield client


@pytest.mark.usefixtures("worker")
def test_twins_are_taken_back_once_and_conflicts_are_for_a_person(
    stack, append_at, clickhouse, unique, meterline
):
    """Beyond the horizon, through another partitioner: two audits at once leave each client what it used."""
    now = time.time_ns() // 1_000_000
    twice, fresh, torn = unique("twice"), unique("fresh"), unique("torn")
    home = {client: partition_for(client.encode(), 4) for client in (twice, fresh, torn)}
    old = UsageEvent("e1", twice, "task", "gpu", 5 * CREDIT, now - 2 * DAY_MS)
    append_at(old, home[twice], now - 2 * DAY_MS)
    append_at(old, home[twice], now)  # beyond the dedupe horizon
    append_at(old, (home[twice] + 1) % 4, now + 1)  # another partitioner
    append_at(old._replace(event_id="e2", credits_micro=CREDIT, billable=False), home[twice], now)
    # In a partition of its own the first copy alone is known.
    new = UsageEvent("e1", fresh, "task", "gpu", 7 * CREDIT, now)
    append_at(new, home[fresh], now)
    append_at(new._replace(source="a resent spool"), (home[fresh] + 2) % 4, now + 2)
    first = UsageEvent("e1", torn, "task", "gpu", 3 * CREDIT, now)
    append_at(first, home[torn], now)
    append_at(first._replace(credits_micro=4 * CREDIT), (home[torn] + 1) % 4, now + 3)
    rows = {twice: (4, 16 * CREDIT), fresh: (2, 14 * CREDIT), torn: (2, 7 * CREDIT)}
    until(lambda: client_books(stack, rows)[0] == rows, "every copy is a row")
    clickhouse.execute("OPTIMIZE TABLE events FINAL")

    assert client_books(stack, rows)[0] == rows, "no merge eats a twin"
    code, said = meterline("audit", "twins", "--dry-run", "--json")
    found = [json.loads(line) for line in said.splitlines()]
    assert code == 1
    assert sorted((one["type"], one.get("client_id", "")) for one in found) == [
        ("conflict", torn),
        ("end", ""),
        ("twin", fresh),
        ("twin", twice),
        ("twin", twice),
    ]
    with ThreadPoolExecutor(2) as threads:
        codes = list(threads.map(lambda _: meterline("audit", "twins")[0], range(2)))
    assert codes == [1, 1], "of the conflict"
    # Each correction is an event more. Snapshots and totals are asked for what is billable.
    rights = {twice: (6, 6 * CREDIT), fresh: (3, 7 * CREDIT), torn: (2, 7 * CREDIT)}
    billable = {twice: (5, 5 * CREDIT), fresh: (3, 7 * CREDIT), torn: (2, 7 * CREDIT)}
    until(
        lambda: client_books(stack, rights) == [rights, billable, billable],
        "ledger, snapshots and totals are right",
    )
    code, said = meterline("audit", "twins")
    assert code == 1
    assert "twins=0 conflicts=1 taken back before=3" in said
