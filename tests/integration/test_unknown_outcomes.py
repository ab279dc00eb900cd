"""An outcome that nobody knows changes no credit: a stalled owner, a commit or an insert without answer."""

from __future__ import annotations

import os
import signal
import time
from decimal import Decimal

import psutil
import pytest
from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from tests.deaf_proxy import DeafProxy
from tests.pipeline_books import WORKER_SETTINGS, committed, metering_metas, settle
from tests.stacks import own_stack
from tests.worker_nursery import NurseryWorker
from tests.worker_processes import ALL, ended_in_the_end, until

from meterline.streaming.steps import Step

pytestmark = [pytest.mark.stack, pytest.mark.timeout(280)]

EXIT_FENCED = 9
MICRO = 1_000_000
FIRST_DEATHS = (Step.TRANSACTION_PRODUCED, Step.TRANSACTION_COMMITTED, Step.ROWS_INSERTED)
"""Of a topic nobody has counted: before the very first commit, right after it, at the first rows."""
STALLS = (Step.ROWS_INSERTED, Step.TRANSACTION_PRODUCED)
"""Before the transaction, and when only its commit is missing."""
LATER = 9
"""More often than there are partitions: one of them has committed before."""


stack = own_stack("local")
"""Its broker is killed, and every record of its topics is ours."""


@pytest.fixture(scope="module")
def make_worker(stack, tmp_path_factory):
    """Makes slots for metering workers, with settings changed; none of their processes is left in the end."""
    folder, made = tmp_path_factory.mktemp("workers"), []

    def make(**changed):
        environment = stack.process_environment() | WORKER_SETTINGS
        made.append(NurseryWorker("metering", environment, folder, **changed))
        return made[-1]

    yield make
    for worker in made:
        worker.kill()


@pytest.fixture(scope="module", autouse=True)
def first_deaths(traffic, make_worker):
    """How the first workers that ever saw these topics ended."""
    traffic.publish(200)
    worker, ends = make_worker(METERLINE_WORKER__INSTANCE_ID="first"), []
    for step in FIRST_DEATHS:
        worker.start(die_at=step)
        ends.append(worker.wait())
    return ends


@pytest.fixture
def worker(make_worker):
    """A worker, not started: the same static member in each test, on another port."""
    made = make_worker(METERLINE_WORKER__INSTANCE_ID="first")
    with ended_in_the_end(made):
        yield made


def is_stopped(worker):
    assert worker.process.poll() is None, f"it ended: {worker.process.poll()} {worker.log_tail()}"
    return psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED


def kafka_pid(stack):
    (pid,) = [service.pid for service in stack.local.status() if service.name == "kafka"]
    return pid


def ledger_of(stack):
    settings = stack.settings.clickhouse
    return ClickHouse(settings.host, settings.port, settings.database)


def test_a_worker_that_dies_around_its_very_first_commit_loses_nothing(stack, traffic, first_deaths, worker):
    """Without META the next one begins at the first record; with it, it reads its own rows as its own."""
    worker.start_ready()

    assert first_deaths == [-signal.SIGKILL] * len(FIRST_DEATHS)
    assert settle(stack, traffic, is_billed=False) == []


def test_stalled_owners_that_wake_up_are_refused(stack, traffic, make_worker):
    """SIGSTOP beyond the session time-out, before the transaction and between produce and commit; SIGCONT.

    Both end with 9. No total knows of it, also not when the changelog is compacted: nothing stale may be its
    newest value.
    """
    sleepers, heir = [make_worker() for _ in STALLS], make_worker()
    with traffic.flowing():
        for sleeper, step in zip(sleepers, STALLS, strict=True):
            sleeper.start(stop_at=step, times=LATER)
            until(lambda one=sleeper: is_stopped(one), f"it sleeps at {step}")
        heir.start()
        until(lambda: heir.is_ready() and heir.partitions() == ALL, "the heir owns all")
        traffic.publish(200)
        for sleeper in sleepers:
            sleeper.signal(signal.SIGCONT)
        codes = [sleeper.wait() for sleeper in sleepers]
    assert codes == [EXIT_FENCED] * len(STALLS)
    assert settle(stack, traffic, is_billed=False) == []

    compact(stack, traffic, "metering-state-changelog")
    assert heir.terminate() == 0
    heir.start_ready()
    traffic.publish(100)
    assert settle(stack, traffic, is_billed=False) == []
    heir.kill()


def compact(stack, traffic, topic):
    """Let the broker's cleaner remove every value that has a newer one; traffic makes new segments."""
    changed = {
        ConfigResource(ConfigResource.Type.BROKER, "1"): {"log.cleaner.backoff.ms": "100"},
        ConfigResource(ConfigResource.Type.TOPIC, topic): {
            "segment.ms": "500",
            "min.cleanable.dirty.ratio": "0.001",
        },
    }
    for resource, values in changed.items():
        for name, value in values.items():
            resource.add_incremental_config(
                ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
            )
    admin = AdminClient(stack.settings.kafka.client_config())
    for done in admin.incremental_alter_configs(list(changed)).values():
        done.result(30)
    before = committed(stack, topic)
    stale = len(before) - len({message.key() for message in before})
    with traffic.flowing():

        def is_compacted():
            now = committed(stack, topic)
            return len(now) - len({message.key() for message in now}) < stale // 2

        until(is_compacted, f"{topic} is compacted")


@pytest.mark.parametrize("asked", ["unanswered", "perhaps"])
def test_a_broker_killed_in_a_commit_changes_no_total(stack, traffic, worker, asked):
    """The commit was asked for and not read, or may have been done: the log says which."""
    with traffic.flowing():
        worker.start(stop_at=Step.TRANSACTION_PRODUCED, times=LATER)
        until(lambda: is_stopped(worker), "it is about to commit")
        broker = kafka_pid(stack)
        if asked == "unanswered":
            os.kill(broker, signal.SIGSTOP)
        worker.signal(signal.SIGCONT)
        time.sleep(0.2 if asked == "unanswered" else 0.002)
        os.kill(broker, signal.SIGKILL)
        stack.local.up()
        traffic.publish(100)
    if worker.process.poll() is None:
        worker.kill()  # whether it went on or ended: the next one finds what was committed
    worker.start_ready()

    assert settle(stack, traffic, is_billed=False) == []


def test_an_insert_that_timed_out_after_it_was_done_counts_once(stack, traffic, make_worker):
    """ClickHouse has the rows, its answers are lost: they are inserted again, and are the same rows."""
    with DeafProxy(stack.settings.clickhouse.port) as proxy:
        worker = make_worker(
            METERLINE_CLICKHOUSE__PORT=str(proxy.port), METERLINE_CLICKHOUSE__SEND_RECEIVE_TIMEOUT_S="1"
        )
        with ended_in_the_end(worker):
            worker.start_ready()
            proxy.deaf = True
            with traffic.flowing():
                until(lambda: "ledger insert failed, trying again" in worker.log_file.read_text(), "time-out")
            done = rows_nobody_committed(stack)
            proxy.deaf = False
            wrong = settle(stack, traffic, is_billed=False)

    assert wrong == []
    assert done > 0


def rows_nobody_committed(stack):
    """Rows of the ledger behind what the committed state accounts for."""
    with ledger_of(stack) as ledger:
        places = ledger.execute("SELECT DISTINCT `partition`, `offset` FROM events")
    applied = {partition: meta["applied_offset"] for partition, meta in metering_metas(stack).items()}
    return sum(offset > applied[partition] for partition, offset in places)


def test_a_merge_eats_copies_of_rows_and_no_twin(stack, traffic, worker):
    """The last one, because a twin is an event that counts twice until somebody corrects it.

    A program with another partitioner publishes an event again. Crashes left copies of rows, too: after a
    forced merge the raw rows are the credits, the twin's among them, and the next worker finds its windows
    equal to them.
    """
    client = min(traffic.credits_micro)
    (message,) = [m for m in committed(stack, "usage.events") if m.key() == client.encode()][:1]
    said = traffic.credits_micro[client]
    twin_of = next(event_id for event_id in said if event_id.encode() in message.value())
    producer = Producer(stack.settings.kafka.client_config())
    producer.produce("usage.events", message.value(), message.key(), (message.partition() + 1) % len(ALL))
    assert producer.flush(30) == 0
    published = sum(sum(events.values()) for events in traffic.credits_micro.values())
    wanted = Decimal(published + said[twin_of]) / MICRO
    worker.start_ready()
    until(lambda: billed(stack) == wanted, "the twin is counted")

    with ledger_of(stack) as ledger:
        ledger.execute("OPTIMIZE TABLE events FINAL")
        raw = ledger.execute("SELECT sum(credits_micro) FROM events")[0][0]
    assert Decimal(raw) / MICRO == wanted
    assert worker.terminate() == 0
    worker.start_ready()
    assert worker.get_json("/healthz/ready")[1]["problems"] == []


def billed(stack):
    """All credits of the ledger, as analysts see them."""
    with ledger_of(stack) as ledger:
        return ledger.execute("SELECT sum(credits) FROM usage")[0][0]
