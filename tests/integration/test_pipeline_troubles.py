"""What happens to a pipeline at work, with two workers: odd producers, a lost ledger, a topic that grows.

One pipeline for all of it: the books are exact after each trouble, and after all of them together.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from decimal import Decimal
from itertools import chain

import pytest
from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from tests.pipeline_books import WORKER_SETTINGS, Traffic, committed, log_ends, settle
from tests.stacks import own_stack
from tests.worker_processes import ALL, WorkerProcess, ended_in_the_end, until

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.topics import USAGE_EVENTS, load_topics

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

stack = own_stack()
"""Every record of its topics is ours; its ClickHouse is stopped, and its topics grow."""

SESSION_S = 6.0
"""WORKER_SETTINGS' session time-out."""
REBALANCE_S_MAX = SESSION_S + 10
GROWN = [0, 1, 2, 3, 4, 5]
LOOKS_EACH_SECOND = {"METERLINE_WORKER__METADATA_MAX_AGE_MS": "1000"}
BATCH_BYTES = 61
"""A record batch's header in the log's format 2."""
RECORD_BYTES = 3 + 1 + 1 + 1 + 1 + 3 + 1
"""Length, attributes, two deltas, the key's length, the value's length (half a megabyte) and no headers."""


@pytest.fixture(scope="module")
def environment(stack):
    return stack.process_environment() | WORKER_SETTINGS | LOOKS_EACH_SECOND


@pytest.fixture(scope="module")
def traffic(stack):
    """Its producer notices new partitions within a second."""
    traffic = Traffic(stack, client_config={"topic.metadata.refresh.interval.ms": 1_000})
    yield traffic
    traffic.close()


@pytest.fixture(scope="module")
def workers(environment, tmp_path_factory):
    """Two of metering, one of billing and one of quota, ready."""
    folder = tmp_path_factory.mktemp("workers")
    kinds = ("metering", "metering", "billing", "quota")
    made = [WorkerProcess(kind, environment, folder) for kind in kinds]
    with ended_in_the_end(*made):
        # Alone first: whom a second one surprises in its very first commit is fenced, and ends.
        made[0].start_ready()
        for worker in made[1:]:
            worker.start()
        until(lambda: share(made[:2], ALL) and all(worker.is_ready() for worker in made), "all are ready")
        yield made


@pytest.fixture
def metering(workers):
    return workers[:2]


def share(workers, partitions):
    """Whether each owns some, together all, and all are restored."""
    owned = [worker.partitions() or [] for worker in workers if worker.is_ready()]
    return len(owned) == len(workers) and all(owned) and sorted(chain(*owned)) == partitions


def test_a_producer_with_another_partitioner_is_counted_exactly(stack, traffic, metering):
    """A client's usage is then in two partitions; its totals, windows and bill are the sums."""
    assert share(metering, ALL)
    traffic.publish(100)
    with traffic.by_another_producer(partitioner="consistent"):
        traffic.publish(100)

    assert settle(stack, traffic) == []
    places = {(message.key(), message.partition()) for message in committed(stack, USAGE_EVENTS)}
    assert len(places) > len(traffic.customers), "some client is in two partitions"


def test_a_record_of_the_largest_size_becomes_a_dead_letter(stack, traffic, metering):
    """The broker takes not a byte more; the letter holds all of it, and nobody's credits are held up."""
    assert share(metering, ALL)
    client_id = next(iter(traffic.customers))
    room = load_topics()[USAGE_EVENTS].max_message_bytes - BATCH_BYTES - RECORD_BYTES - len(client_id)
    value = b"\xc3\x01" + b"x" * (room - 2)
    before = {m.offset() for m in committed(stack, "usage.events.dlq")}
    traffic.publish(50)
    with pytest.raises(KafkaException) as refused:
        produce(stack, client_id, value + b"x")
    produce(stack, client_id, value)
    traffic.dead_letters += 1
    traffic.publish(50)

    assert refused.value.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE
    assert settle(stack, traffic) == []
    (letter,) = [m for m in committed(stack, "usage.events.dlq") if m.offset() not in before]
    assert RecordCodec("dead-letter").decode(letter.value())["value"] == value


def produce(stack, client_id, value):
    """One record as another program writes it, in a batch of its own.

    Raises:
        KafkaException: the broker refused it.
    """
    outcome = []
    # The client's own limit must not be met before the broker's.
    producer = Producer(stack.settings.kafka.client_config() | {"message.max.bytes": 2_000_000})
    producer.produce(
        USAGE_EVENTS,
        value,
        client_id,
        partition=partition_for(client_id.encode(), len(ALL)),
        on_delivery=lambda error, _: outcome.append(error),
    )
    assert producer.flush(30) == 0
    if outcome[0] is not None:
        raise KafkaException(outcome[0])


def test_a_worker_joins_while_clickhouse_is_away(stack, traffic, workers, environment, tmp_path):
    """The rebalance ends at once and stays ended: nobody is thrown out for waiting. Then all is counted."""
    joining = WorkerProcess("metering", environment, tmp_path)
    with ended_in_the_end(joining):
        with stack.without_clickhouse():
            traffic.publish(100)
            joining.start()
            until(lambda: joining.get("/metrics")[0] == 200, "the third worker has started")
            began = time.monotonic()
            until(lambda: members(stack) == 3, "the group is stable with three", REBALANCE_S_MAX)
            took = time.monotonic() - began
            while time.monotonic() - began < took + SESSION_S:
                assert members(stack) == 3, "a member was thrown out, or the group rebalances again"
                time.sleep(0.5)
        traffic.publish(100)
        until(lambda: share([*workers[:2], joining], ALL), "all three work")
        assert settle(stack, traffic) == []
        assert joining.terminate() == 0
    until(lambda: share(workers[:2], ALL), "two have all again")


def members(stack):
    """How many members the group of metering has when it is stable; 0 while it isn't."""
    admin = AdminClient(stack.settings.kafka.client_config())
    group = admin.describe_consumer_groups(["metering"])["metering"].result(10)
    return len(group.members) if group.state == ConsumerGroupState.STABLE else 0


def test_a_topic_grows_while_everything_runs(stack, traffic, workers, environment):
    """Producers, metering, billing and quota go on without a restart; each credit is where it belongs."""
    mover = next(
        name
        for name in (f"mover-{uuid.uuid4().hex[:8]}" for _ in range(10_000))
        if partition_for(name.encode(), len(ALL)) < len(ALL) <= partition_for(name.encode(), len(GROWN))
    )
    traffic.add_client(mover)
    traffic.resent_share = 0
    meterline(environment, "quota", "grant", mover, "100000", "--reason", "test", "--wait")
    with traffic.flowing():
        until(lambda: traffic.credits_micro[mover], "the client works before")
        done = json.loads(meterline(environment, "topics", "grow", USAGE_EVENTS, "6", "--json"))["done"]
        until(lambda: share(workers[:2], GROWN), "both share all six")
        until(lambda: share(workers[3:], GROWN), "quota has all six")
        until(lambda: log_ends(stack, USAGE_EVENTS)[partition_for(mover.encode(), 6)] > 10, "it is used")

    assert [step["topic"] for step in done] == [
        "usage.events.dlq",
        "quota-state-changelog",
        "usage.totals",
        "metering-state-changelog",
        "usage.events",
    ]
    assert settle(stack, traffic) == []
    used = sum(traffic.credits_micro[mover].values())
    until(lambda: consumed(environment, mover) == used, "the credit bucket knows all of it")
    assert all(worker.process.poll() is None for worker in workers)


def meterline(environment, *words):
    """What the command says."""
    command = [sys.executable, "-m", "meterline", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def consumed(environment, client_id):
    """Micro-credits the client's bucket has been charged."""
    said = json.loads(meterline(environment, "quota", "balance", client_id, "--json"))
    return int(Decimal(said["consumed"]) * 1_000_000)
