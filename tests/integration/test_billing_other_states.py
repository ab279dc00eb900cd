"""State and account that don't belong together: what was billed once stays so, or billing says why it stops.

A lost changelog, a wiped account, two installations on one account: real Kafka, ClickHouse and sandbox; the
windows are said by the test.
"""

from __future__ import annotations

import shutil
import threading
from contextlib import contextmanager
from itertools import count

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from tests.pipeline_books import WORKER_SETTINGS, committed
from tests.stacks import own_stack, settings_of
from tests.window_feed import WindowFeed, this_hour_ms
from tests.worker_nursery import NurseryWorker
from tests.worker_processes import ALL, ended_in_the_end, until

from meterline.contracts.partitioner import partition_for
from meterline.contracts.topic_admin import TopicAdmin
from meterline.contracts.topics import load_topics
from meterline.ledger.client import connect
from meterline.ledger.migrate import apply_migrations
from meterline.local.kafka import Kafka
from meterline.local.ports import HOST, Ports
from meterline.local.python_services import StripeSandbox
from meterline.local.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(200)]

stack = own_stack("local")
"""Its sandbox is wiped, and a topic deleted."""

CHANGELOG = "billing-state-changelog"
HOUR_MS = 3_600_000
EACH = [7_600_000, 9_000_000, 450_000, 3_999_999]
"""Micro-credits of one hour, client by client."""


def client_of(partition):
    return next(
        name
        for name in (f"client-{number}" for number in count())
        if partition_for(name.encode(), len(ALL)) == partition
    )


CLIENTS = [client_of(partition) for partition in ALL]


@pytest.fixture(scope="module")
def feed(stack, tmp_path_factory):
    """Of one client in each partition of usage.windows; something is billed of each."""
    feed = WindowFeed(stack.settings)
    feed.add_clients(CLIENTS)
    use(feed, 5)
    first = billing_worker(stack, tmp_path_factory.mktemp("first"))
    with ended_in_the_end(first):
        bill(feed, first)
    yield feed
    feed.close()


def billing_worker(stack, folder, **changed):
    return NurseryWorker("billing", stack.process_environment() | WORKER_SETTINGS, folder, **changed)


@pytest.fixture
def worker(stack, tmp_path):
    """Of billing, not started; nothing of it is left in the end."""
    made = billing_worker(stack, tmp_path)
    with ended_in_the_end(made):
        yield made


def use(feed, hours_ago):
    """Every client works in an hour."""
    start = this_hour_ms() - hours_ago * HOUR_MS
    feed.say((client, start, micro) for client, micro in zip(CLIENTS, EACH, strict=True))


def all_paid(feed):
    until(lambda: feed.units_at_stripe() == feed.owed_units(), "Stripe counts what is owed")


def bill(feed, worker):
    """What is owed arrives; then no worker is there."""
    worker.start_ready()
    all_paid(feed)
    assert worker.terminate() == 0


def test_a_lost_changelog_stops_billing_and_its_copy_goes_on(stack, feed, worker):
    """Topic and group are gone, Stripe and the ledger are not: a fresh start would bill everything again."""
    paid, copy = feed.units_at_stripe(), committed(stack, CHANGELOG)
    admin = AdminClient(stack.settings.kafka.client_config())
    for gone in (admin.delete_topics([CHANGELOG]), admin.delete_consumer_groups(["billing"])):
        for done in gone.values():
            done.result(30)
    until(lambda: CHANGELOG not in admin.list_topics(timeout=10).topics, "the topic is gone")
    TopicAdmin(stack.settings.kafka).apply(load_topics())
    use(feed, 4)
    worker.start()

    until(lambda: len(worker.halts()) == len(ALL), "every partition halts")
    assert all("its changelog accounts for 0: the changelog lost state" in why for why in worker.halts())
    assert worker.terminate() == 0
    assert feed.units_at_stripe() == paid
    producer = Producer(stack.settings.kafka.client_config())
    for record in copy:
        producer.produce(CHANGELOG, record.value(), record.key(), record.partition())
    assert producer.flush(30) == 0
    bill(feed, worker)


@contextmanager
def wiped_sandbox(stack):
    """Another, empty account answers under the same address and key, until the end of the block."""
    where, ports = stack.local.state_dir, stack.local.ports
    memory, aside = where / "stripe", where / "stripe-kept"
    sandbox = Stack(where, ports, [StripeSandbox(memory, ports)])
    sandbox.down()
    memory.rename(aside)
    sandbox.up()
    yield
    sandbox.down()
    shutil.rmtree(memory)
    aside.rename(memory)
    sandbox.up()


def test_a_wiped_account_is_told_nothing_until_the_right_one_is_back(stack, feed, worker):
    """What it was told before is not there: going on would bill the rest of a period to nobody."""
    with wiped_sandbox(stack):
        use(feed, 2)
        worker.start()

        until(lambda: len(worker.halts()) == len(ALL), "every partition halts")
        assert all("meter credits was billed as mtr_" in why for why in worker.halts())
        asked = [line for line in worker.get("/metrics")[1].splitlines() if "stripe_requests_total{" in line]
        assert asked == []
        assert worker.terminate() == 0
    bill(feed, worker)


@pytest.fixture
def other_settings(stack, tmp_path):
    """An installation with a Kafka and a ledger of its own, at the same Stripe account."""
    ports = Ports.free()
    kafka = Stack(tmp_path / "other", ports, [Kafka(tmp_path / "other" / "kafka", ports, threading.Event())])
    own = {
        "METERLINE_KAFKA__BOOTSTRAP_SERVERS": f"{HOST}:{ports.kafka}",
        "METERLINE_CLICKHOUSE__DATABASE": "other",
        "METERLINE_BILLING__INSTALLATION_ID": "other",
    }
    with connect(stack.settings.clickhouse) as admin:
        admin.execute("CREATE DATABASE other")
    try:
        kafka.up()
        environment = dict(stack.environment) | own
        settings = settings_of(environment)
        TopicAdmin(settings.kafka).apply(load_topics())
        apply_migrations(settings.clickhouse)
        yield environment
    finally:
        kafka.down(wipe=True)


def test_two_installations_on_one_account_are_both_paid(stack, feed, worker, other_settings, tmp_path):
    """The same clients, customers, hours and offsets: Stripe must not take one's usage for the other's."""
    other = WindowFeed(settings_of(other_settings))
    other.add_clients(CLIENTS, feed.customers)
    use(other, 5)
    use(feed, 1)
    second = billing_worker(stack, tmp_path, **other_settings)
    with ended_in_the_end(second):
        for one in (worker, second):
            one.start_ready()
        both = {client: feed.owed_units()[client] + other.owed_units()[client] for client in CLIENTS}
        until(lambda: feed.units_at_stripe() == both, "Stripe counts what both are owed")
        assert [one.terminate() for one in (worker, second)] == [0, 0]
    other.close()
