"""A halted partition names the command that brings it back, and after it every credit is counted once."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from clickhouse_driver import Client as ClickHouse
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from tests.pipeline_books import (
    WORKER_SETTINGS,
    Traffic,
    client_books,
    committed,
    log_ends,
    metering_metas,
)
from tests.stacks import own_stack
from tests.worker_processes import ALL, WorkerProcess, ended_in_the_end, until

from meterline.contracts.topic_admin import TopicAdmin
from meterline.contracts.topics import METERING_CHANGELOG, USAGE_EVENTS, load_topics
from meterline.metering.repair_evidence import Evidence, RepairTools
from meterline.metering.repair_state import StatePlan, commit_as_owner
from meterline.metering.state import Meta, meta_key
from meterline.streaming.log_ranges import read_log_ranges
from meterline.streaming.steps import Step

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

POISON = b"poison of this module"
POISON_PAUSE_S = 0.05


stack = own_stack()
"""Its topics and rows are deleted."""


@pytest.fixture
def traffic(stack):
    """Clients of this test alone."""
    traffic = Traffic(stack)
    yield traffic
    traffic.close()


@pytest.fixture
def worker(stack, tmp_path):
    """A metering worker, not started. It keeps windows for so long that none is forgotten in a test."""
    made = WorkerProcess(
        "metering",
        stack.process_environment() | WORKER_SETTINGS,
        tmp_path,
        METERLINE_METERING__KEEP_CLOSED_WINDOWS_MS="120000",
    )
    with ended_in_the_end(made):
        yield made


@pytest.fixture
def clickhouse(stack):
    settings = stack.settings.clickhouse
    with ClickHouse(settings.host, settings.port, settings.database) as client:
        yield client


def is_applied(stack):
    metas, ends = metering_metas(stack), log_ends(stack, USAGE_EVENTS)
    return all(metas.get(p, {}).get("applied_offset", -1) == ends[p] - 1 for p in ALL)


def halts_of(worker):
    """Of each halted partition the text, when the worker has looked at all partitions."""
    found = {}

    def looked():
        assert worker.process.poll() is None, worker.log_tail()
        status, answer = worker.get_json("/healthz/ready")
        problems = answer.get("problems", [])
        found.clear()
        for problem in problems:
            if halted := re.match(r"partition (\d+) halted: (.*)", problem):
                found[int(halted[1])] = halted[2]
        return status == 503 and len(found) == len(problems)

    until(looked, "it says what is wrong")
    return found


def run_told(meterline, why, *, reason="a test"):
    """Do what the text of a halt says."""
    told = re.search(r"meterline (repair .*?) --reason WHY", why)
    return meterline(*told[1].split(), "--reason", reason)


def settled(stack, traffic):
    """Wait until ledger, latest snapshots and totals are what was published; what they are in the end."""
    owed = {client: (len(events), sum(events.values())) for client, events in traffic.credits_micro.items()}
    books = []

    def exact():
        books[:] = client_books(stack, owed)
        return books == [owed] * 3

    try:
        until(exact, "the books are exact", 30)
    except AssertionError:
        assert books == [owed] * 3
    return books == [owed] * 3


def account_of(meta):
    """Whether what became of the offsets adds up to them."""
    counters = meta["counters"]
    told = sum(counters[name] for name in ("accepted", "duplicates", "dead_letters", "skipped", "unknown"))
    return told == meta["applied_offset"] + 1 - counters["first_offset"]


def recreate(stack, topic):
    admin = AdminClient(stack.settings.kafka.client_config())
    admin.delete_topics([topic])[topic].result(30)

    def applied():
        try:
            TopicAdmin(stack.settings.kafka).apply(load_topics())
        except KafkaException:
            return False
        return topic in admin.list_topics(timeout=10).topics

    until(applied, f"{topic} is there again")


def poison(stack):
    """A dead letter in every partition."""
    producer = Producer(stack.settings.kafka.client_config())
    for partition in ALL:
        producer.produce(USAGE_EVENTS, b"{}", POISON, partition)
    assert producer.flush(30) == 0
    return len(ALL)


def test_a_lost_changelog_is_rebuilt_from_the_ledger(stack, traffic, worker, meterline, clickhouse):
    """Also where a worker died between rows and commit: it goes on, and every credit is counted once."""
    worker.start(die_at=Step.ROWS_INSERTED, times=15)
    poisoned = 0
    with traffic.flowing():
        while worker.process.poll() is None:  # also in the flush that is inserted and not committed
            poisoned += poison(stack)
            time.sleep(POISON_PAUSE_S)
    recreate(stack, METERING_CHANGELOG)
    worker.start()
    halts = halts_of(worker)

    assert sorted(halts) == ALL
    assert all(f"meterline repair state {p} --reason WHY" in why for p, why in halts.items())
    dry = meterline("repair", "state", *ALL, "--dry-run")
    assert (dry[0], dry[1].count("would be rebuilt")) == (0, 4), dry
    assert metering_metas(stack) == {}
    done = meterline("repair", "state", *ALL, "--reason", "changelog deleted", "--by", "ada")
    assert (done[0], done[1].count(": rebuilt")) == (0, 4), done
    assert worker.terminate() == 0
    worker.start_ready()
    traffic.publish(100)
    until(lambda: is_applied(stack), "all is applied")
    assert settled(stack, traffic)
    metas = metering_metas(stack)
    assert [p for p in ALL if not account_of(metas[p])] == []
    assert sum(meta["counters"]["unknown"] for meta in metas.values()) > 0
    letters = [m.value() for m in committed(stack, "usage.events.dlq") if m.key() == POISON]
    assert len(letters) == len(set(letters)) == poisoned, "each names its offset"
    assert clickhouse.execute(
        "SELECT changed_by, reason, count() FROM repairs WHERE action = 'state' AND detail LIKE '%rebuilt' "
        "GROUP BY changed_by, reason"
    ) == [("ada", "changelog deleted", 4)]
    again = meterline("repair", "state", *ALL, "--reason", "once more")
    assert (again[0], again[1].count("nothing to repair")) == (0, 4), again
    assert worker.process.poll() is None, "a partition that needs nothing keeps its worker"


def test_rows_lost_by_the_ledger_are_read_from_the_log_again(stack, traffic, worker, meterline, clickhouse):
    """A range that would not make the sums right is refused; the whole one brings every credit back."""
    worker.start_ready()
    traffic.publish(300)
    until(lambda: is_applied(stack), "all is applied")
    assert worker.terminate() == 0
    partition = max(ALL, key=log_ends(stack, USAGE_EVENTS).__getitem__)
    offsets = [
        offset
        for (offset,) in clickhouse.execute(
            "SELECT `offset` FROM events WHERE `partition` = %(p)s AND client_id IN %(c)s ORDER BY `offset`",
            {"p": partition, "c": list(traffic.customers)},
        )
    ]
    lost = offsets[-40:-20] + offsets[-10:]
    clickhouse.execute(
        "ALTER TABLE events DELETE WHERE `partition` = %(p)s AND `offset` IN %(lost)s "
        "SETTINGS mutations_sync = 2",
        {"p": partition, "lost": lost},
    )
    worker.start()
    (why,) = halts_of(worker).values()

    assert f"meterline repair ledger {partition} --reason WHY" in why
    count = f"SELECT uniqExact(`offset`) FROM events WHERE `partition` = {partition} AND `offset` IN {lost}"
    narrow = meterline("repair", "ledger", partition, "--from", lost[-1], "--to", lost[-1], "--reason", "x")
    assert narrow[0] == 1, narrow
    assert "the ledger would still not be what was counted" in narrow[1]
    state = meterline("repair", "state", partition, "--reason", "wrong command")
    assert state[0] == 1, state
    assert f"lacks {len(lost)} of" in state[1]
    dry = meterline("repair", "ledger", partition, "--dry-run")
    assert (dry[0], f"{len(lost)} rows missing" in dry[1]) == (0, True), dry
    assert clickhouse.execute(count) == [(0,)]
    assert run_told(meterline, why)[0] == 0
    assert clickhouse.execute(count) == [(len(lost),)]
    assert worker.terminate() == 0
    worker.start_ready()
    assert settled(stack, traffic)


def test_a_log_that_lost_its_end_is_filled_up(stack, traffic, worker, meterline):
    """Events that got offsets which count as taken are appended again: each is counted once."""
    worker.start_ready()
    traffic.publish(50)
    until(lambda: is_applied(stack), "all is applied")
    assert worker.terminate() == 0
    partition = 0
    (log,) = read_log_ranges(stack.settings.kafka, USAGE_EVENTS, [partition]).values()
    lost = 200

    def counted_further():
        """Kafka can't be made to lose records: the state is put ahead of it instead."""
        tools = RepairTools(stack.settings.kafka, stack.settings.metering, None, 4)
        state = Evidence.gather(tools, log, METERING_CHANGELOG).state
        meta = Meta.from_bytes(state[meta_key(partition)])
        counters = replace(meta.counters, unknown=meta.counters.unknown + lost)
        ahead = replace(meta, applied_offset=meta.applied_offset + lost, counters=counters)
        return StatePlan(log, "", ahead, [(meta_key(partition), ahead.to_bytes())])

    ahead = commit_as_owner(stack.settings.kafka, partition, counted_further).meta.applied_offset
    traffic.publish(60)
    taken = log_ends(stack, USAGE_EVENTS)[partition]
    assert log.end_offset < taken <= ahead
    worker.start()
    (why,) = halts_of(worker).values()

    assert f"offsets {taken}..{ahead} were counted, but the log ends at {taken - 1}" in why
    code, said = run_told(meterline, why)
    assert code == 0, said
    assert f"{taken - log.end_offset} events at counted offsets" in said
    assert worker.terminate() == 0
    worker.start_ready()
    until(lambda: is_applied(stack), "all is applied")
    assert settled(stack, traffic)
    assert "nothing to repair" in meterline("repair", "log", partition, "--reason", "once more")[1]


def test_a_recreated_topic_is_closed_and_the_new_one_begun(stack, traffic, worker, meterline):
    """Of the old topic every counted credit is published; the new one is counted from its start."""
    worker.start_ready()
    traffic.publish(200)
    until(lambda: is_applied(stack), "all is applied")
    worker.kill()  # its newest windows are not closed
    recreate(stack, USAGE_EVENTS)
    worker.start()
    halts = halts_of(worker)

    assert sorted(halts) == ALL
    for partition, why in halts.items():
        assert "re-created" in why
        assert f"meterline repair state {partition} --reason WHY" in why
    assert meterline("repair", "ledger", 0, "--reason", "wrong command")[0] == 1
    code, said = meterline("repair", "state", *ALL, "--reason", "topic deleted by mistake")
    assert code == 0, said
    assert settled(stack, traffic)
    assert worker.terminate() == 0
    worker.start_ready()
    of_the_new = Traffic(stack)
    of_the_new.publish(100)
    of_the_new.close()
    assert settled(stack, of_the_new)
    assert settled(stack, traffic)
