"""What leaves a worker reaches Kafka once, and what does not reach it reaches the caller: on real Kafka."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from meterline.clients import ClientRegistry
from meterline.clients.records import client_to_record
from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.topics import CLIENTS, USAGE_EVENTS, load_topics
from meterline.domain.clients import Client
from meterline.domain.events import ATTRIBUTE_KEY_BYTES_MAX, ATTRIBUTE_VALUE_BYTES_MAX, ATTRIBUTES_MAX
from meterline.errors import RetryLater, UserError
from meterline.producer import DeliveryFailed, InvalidUsage, UsageProducer
from meterline.settings import KafkaSettings, Settings

pytestmark = pytest.mark.stack

READ_S_MAX = 30
HEADER = "client_id,correlation_id,sku,credits\n"


@pytest.fixture
def client_id(unique):
    """A client of this test alone: what others publish is not seen."""
    return unique("client")


@pytest.fixture
def nowhere():
    """Settings for a Kafka that isn't there: a port that is bound, and on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        yield Settings(kafka=KafkaSettings(bootstrap_servers=address))


@pytest.fixture
def command(settings):
    """Run `meterline`; what it ended with."""
    environment = os.environ | {"METERLINE_KAFKA__BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers}

    def run(*arguments, stdin="", **settings_changed):
        done = subprocess.run(
            [Path(sys.executable).with_name("meterline"), *arguments],
            input=stdin,
            env=environment | settings_changed,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done

    return run


def read(settings, topic, key):
    """All records of a key up to the topic's present end: partition, value."""
    consumer = Consumer(settings.kafka.client_config() | {"group.id": str(uuid.uuid4())})
    try:
        found = []
        for partition in consumer.list_topics(topic, 10).topics[topic].partitions:
            start, end = consumer.get_watermark_offsets(TopicPartition(topic, partition), 10)
            consumer.assign([TopicPartition(topic, partition, start)])
            deadline = time.monotonic() + READ_S_MAX
            position = start
            while position < end:
                assert time.monotonic() < deadline, f"{topic} was not read to {end}"
                for message in consumer.consume(1_000, 0.1):
                    assert message.error() is None
                    position = message.offset() + 1
                    if message.key() == key.encode():
                        found.append((partition, message.value()))
                if consumer.position([TopicPartition(topic, partition)])[0].offset >= end:
                    break
        return found
    finally:
        consumer.close()


def events(settings, client_id):
    codec = RecordCodec("usage-event")
    return [codec.decode(value) for _, value in read(settings, USAGE_EVENTS, client_id)]


def write(settings, records, end=None):
    """Write clients as another program does; with `end` in a transaction that is committed or aborted."""
    if end is not None:
        with transaction(settings, records, end=end) as finish:
            finish()
        return
    producer = Producer(settings.kafka.client_config() | {"acks": "all"})
    for key, value in records:
        producer.produce(CLIENTS, value, key.encode())
    assert producer.flush(READ_S_MAX) == 0


@contextmanager
def transaction(settings, records, end="commit"):
    """An open transaction that holds these records; yields what ends it."""
    producer = Producer(settings.kafka.client_config() | {"transactional.id": f"test-{uuid.uuid4()}"})
    producer.init_transactions(READ_S_MAX)
    producer.begin_transaction()
    for key, value in records:
        producer.produce(CLIENTS, value, key.encode())
    assert producer.flush(READ_S_MAX) == 0
    yield producer.commit_transaction if end == "commit" else producer.abort_transaction


def task(client_id, number=0, **change):
    return {"client_id": client_id, "correlation_id": f"t{number}", "sku": "gpu", "credits": "0.5"} | change


def test_each_event_is_delivered_once_and_in_order(settings, client_id):
    """A thousand events of a client are a thousand records of the one partition that is the client's."""
    with UsageProducer(settings) as usage:
        ids = [usage.publish(**task(client_id, number)) for number in range(1_000)]
    records = read(settings, USAGE_EVENTS, client_id)
    codec = RecordCodec("usage-event")

    assert usage.acknowledged == 1_000
    assert [codec.decode(value)["event_id"] for _, value in records] == ids
    assert {partition for partition, _ in records} == {
        partition_for(client_id.encode(), load_topics()[USAGE_EVENTS].partitions)
    }


def test_publishing_again_gives_the_same_ids(settings, client_id):
    """In this process and in another one: metering finds one event, however often its task ran."""
    with UsageProducer(settings) as usage:
        first = usage.publish(**task(client_id))
        again = usage.publish(**task(client_id))
    with UsageProducer(settings) as usage:
        elsewhere = usage.publish(**task(client_id))

    assert {first} == {again, elsewhere}
    assert [event["event_id"] for event in events(settings, client_id)] == [first] * 3


def test_other_credits_for_the_same_charge_are_refused(settings, client_id):
    """And nothing of it is sent; `item` tells two charges apart."""
    with UsageProducer(settings) as usage:
        usage.publish(**task(client_id))
        with pytest.raises(InvalidUsage, match="already published by this process"):
            usage.publish(**task(client_id, credits=7))
        usage.publish(**task(client_id, credits=7, item=1))

    assert [event["credits_micro"] for event in events(settings, client_id)] == [500_000, 7_000_000]


def test_the_largest_events_pass_beside_small_ones(settings, client_id):
    """The broker counts whole unpacked batches against its limit: no batch of ours comes near it."""
    attributes = {
        f"{n:02}".ljust(ATTRIBUTE_KEY_BYTES_MAX, "k"): "v" * ATTRIBUTE_VALUE_BYTES_MAX
        for n in range(ATTRIBUTES_MAX)
    }
    with UsageProducer(settings, client_config={"linger.ms": 200}) as usage:
        for number in range(60):
            usage.publish(**task(client_id, number, attributes=attributes if number % 3 == 0 else None))

    assert len(events(settings, client_id)) == 60


def test_what_the_broker_refuses_reaches_the_caller_with_its_id(settings, client_id):
    """A batch above the topic's limit (the limits of an event prevent it; here many are forced into one)."""
    told = []
    usage = UsageProducer(
        settings,
        on_delivery=lambda event_id, error: told.append((event_id, error)),
        client_config={"batch.size": 5_000_000, "message.max.bytes": 5_000_000, "linger.ms": 1_000},
    )
    ids = [usage.publish(**task(client_id, n, attributes={"a": "v" * 4_096})) for n in range(400)]
    with pytest.raises(DeliveryFailed, match="too large") as failed:
        usage.close()

    failures = [event_id for event_id, _ in failed.value.events]
    assert set(failures) <= set(ids)
    assert len(failures) + usage.acknowledged == 400
    assert sorted(ids) == sorted(event_id for event_id, _ in told)
    assert sorted(failures) == sorted(event_id for event_id, error in told if error is not None)


def test_many_threads_share_one_producer(settings, client_id):
    """With a queue of fifty: publish waits for room, and nothing is lost or doubled."""
    with (
        UsageProducer(settings, client_config={"queue.buffering.max.messages": 50}) as usage,
        ThreadPoolExecutor(8) as threads,
    ):
        ids = list(threads.map(lambda number: usage.publish(**task(client_id, number)), range(4_000)))
        usage.flush()

    assert usage.acknowledged == 4_000
    assert sorted(event["event_id"] for event in events(settings, client_id)) == sorted(ids)


def test_events_given_up_are_told_with_their_ids_once(nowhere):
    """No Kafka: flush says what waits; close gives up and lists it; a second close has nothing to add."""
    usage = UsageProducer(nowhere)
    ids = [usage.publish(**task("acme", number)) for number in range(3)]
    with pytest.raises(RetryLater, match=r"3 event\(s\) are not yet acknowledged"):
        usage.flush(0.2)
    with pytest.raises(DeliveryFailed) as failed:
        usage.close(0.2)
    usage.close()

    assert [event_id for event_id, _ in failed.value.events] == ids
    with pytest.raises(UserError, match="is closed"):
        usage.publish(**task("acme", 4))


def test_what_timed_out_is_told_by_the_next_publish(nowhere):
    """A worker that never flushes hears of it, too; the event of that call was not queued."""
    usage = UsageProducer(nowhere, client_config={"message.timeout.ms": 300, "linger.ms": 0})
    first = usage.publish(**task("acme"))
    deadline = time.monotonic() + READ_S_MAX
    told = None
    while told is None:
        assert time.monotonic() < deadline
        try:
            usage.publish(**task("acme"))
        except DeliveryFailed as failed:
            told = failed
        time.sleep(0.05)
    with pytest.raises(DeliveryFailed):
        usage.close(0.1)

    assert {event_id for event_id, _ in told.events} == {first}


def test_a_full_queue_slows_down_and_then_says_so(nowhere):
    """Memory is bounded: the event that found no room is not queued, and may be published again."""
    usage = UsageProducer(nowhere, publish_timeout_s=0.3, client_config={"queue.buffering.max.messages": 2})
    ids = [usage.publish(**task("acme", number)) for number in range(2)]
    began = time.monotonic()
    with pytest.raises(RetryLater, match=r"queue stayed full .* not queued; publish it again"):
        usage.publish(**task("acme", 2))
    waited = time.monotonic() - began
    with pytest.raises(DeliveryFailed) as failed:
        usage.close(0.1)

    assert 0.3 <= waited < 5
    assert [event_id for event_id, _ in failed.value.events] == ids


def test_what_on_delivery_raises_is_not_swallowed(settings, client_id):
    """It comes out of the next call."""

    def fail(_event_id, _error):
        raise ZeroDivisionError("in the callback")

    usage = UsageProducer(settings, on_delivery=fail)
    usage.publish(**task(client_id))
    with pytest.raises(ZeroDivisionError):
        usage.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a word of Unix")
def test_after_a_fork_the_child_is_refused_and_the_parent_goes_on(settings, client_id):
    """librdkafka's threads are not in the child: publishing there would wait for ever."""
    script = (
        "import os, sys\n"
        "from meterline.producer import UsageProducer\n"
        "from meterline.errors import UserError\n"
        "usage = UsageProducer()\n"
        "task = dict(client_id=sys.argv[1], correlation_id='t1', sku='gpu', credits=1)\n"
        "usage.publish(**task)\n"
        "if (child := os.fork()) == 0:\n"
        "    try:\n"
        "        usage.publish(**task)\n"
        "    except UserError:\n"
        "        usage.close()\n"
        "        os._exit(7)\n"
        "    os._exit(1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    environment = os.environ | {"METERLINE_KAFKA__BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers}
    done = subprocess.run(
        [sys.executable, "-c", script, client_id],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout == "7\n"
    assert len(events(settings, client_id)) == 1  # published at exit, without a close()


def test_a_file_published_twice_holds_the_same_events(command, settings, client_id, tmp_path):
    """`meterline publish` run again sends the same ids: metering counts each once."""
    file = tmp_path / "usage.csv"
    file.write_text(HEADER + "".join(f"{client_id},t{n},gpu,0.25\n" for n in range(100)))
    runs = [command("publish", str(file), "--json") for _ in range(2)]
    ids = [event["event_id"] for event in events(settings, client_id)]

    assert [done.returncode for done in runs] == [0, 0]
    assert [json.loads(done.stdout)["published"] for done in runs] == [100, 100]
    assert ids[:100] == ids[100:]
    assert len(set(ids)) == 100


def test_a_pipe_is_published(command, settings, client_id):
    """JSON lines from standard input."""
    done = command("publish", "-", "--format", "jsonl", stdin=json.dumps(task(client_id, credits=0.25)))

    assert (done.returncode, done.stdout) == (0, "Published 1 events (0.25 credits).\n")
    assert [event["credits_micro"] for event in events(settings, client_id)] == [250_000]


def test_without_kafka_the_command_says_what_to_do(command, nowhere, tmp_path):
    """Exit code 1, one sentence, nothing on standard output."""
    file = tmp_path / "usage.csv"
    file.write_text(HEADER + "acme,t1,gpu,1\n")
    address = nowhere.kafka.bootstrap_servers
    done = command("publish", str(file), METERLINE_KAFKA__BOOTSTRAP_SERVERS=address)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"Kafka does not answer at {address}" in done.stderr
    assert "`meterline up`" in done.stderr
    assert "0 of 1 events were acknowledged" in done.stderr


def test_ctrl_c_ends_a_running_command(nowhere, tmp_path):
    """A real SIGINT while it waits for a Kafka that isn't there: 130, a sentence, no traceback, soon."""
    file = tmp_path / "usage.csv"
    file.write_text(HEADER + "acme,t1,gpu,1\n")
    environment = os.environ | {
        "METERLINE_KAFKA__BOOTSTRAP_SERVERS": nowhere.kafka.bootstrap_servers,
        "PYTHONUNBUFFERED": "1",
    }
    script = (
        "import sys; from meterline.cli.main import main; from meterline.producer import UsageProducer\n"
        "check = UsageProducer.check\n"
        "def told(self): print('asking', flush=True); check(self, 60)\n"
        "UsageProducer.check = told; sys.argv[0] = 'meterline'; main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, "publish", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "asking\n"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()

    assert process.returncode == 130
    assert "Interrupted: 0 of 1 events were acknowledged by Kafka." in err
    assert "Traceback" not in err


def test_a_client_that_was_set_is_listed(command, client_id):
    """A second `set` changes what is given; everything else stays as it was."""
    first = command(
        "clients", "set", client_id, "--stripe-customer", "cus_1", "--by", "ann", "--period", "week"
    )
    second = command("clients", "set", client_id, "--test", "--by", "bob")
    listed = {
        client["client_id"]: client for client in json.loads(command("clients", "list", "--json").stdout)
    }

    assert first.stdout.startswith(f"Added {client_id}: Stripe customer cus_1, period week")
    assert second.stdout.startswith(f"Changed {client_id}: Stripe customer cus_1, period week")
    assert listed[client_id] | {"updated_at": 0} == {
        "client_id": client_id,
        "stripe_customer_id": "cus_1",
        "period_unit": "week",
        "period_anchor": 4 * 86_400_000,
        "quota_policy": "deny",
        "alert_levels_percent": [],
        "test": True,
        "sending_paused": False,
        "updated_at": 0,
        "updated_by": "bob",
    }


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--stripe-customer", "acct_1"], "not a Stripe customer id"),
        (["--stripe-customer", "cus_1", "--no-stripe-customer"], "not both"),
        (["--anchor", "soon"], "not ISO 8601"),
    ],
)
def test_a_wrong_client_is_refused(command, client_id, options, why):
    """Exit code 2 and what is wrong; the registry doesn't learn of it."""
    done = command("clients", "set", client_id, "--by", "ann", *options)

    assert done.returncode == 2
    assert why in done.stderr
    assert client_id not in command("clients", "list", "--json").stdout


def test_the_registry_follows_changes_and_removals(settings, client_id):
    """A null value removes a client: usage of a removed client must not go to its former Stripe customer."""
    client = Client(client_id, stripe_customer_id="cus_1", updated_by="test")
    with ClientRegistry(settings) as registry:
        registry.put(client)
        registry.wait_until_caught_up(READ_S_MAX)
        assert registry.get(client_id) == client
        version = registry.version

        registry.put(replace(client, sending_paused=True))
        registry.wait_until_caught_up(READ_S_MAX)
        assert registry.get(client_id) == replace(client, sending_paused=True)

        write(settings, [(client_id, None)])
        registry.wait_until_caught_up(READ_S_MAX)
        assert registry.get(client_id) is None
        assert client_id not in registry.snapshot()
        assert registry.version == version + 2
    with ClientRegistry(settings) as registry:
        registry.wait_until_caught_up(READ_S_MAX)
        assert registry.get(client_id) is None


def test_the_registry_reads_committed_records_only(settings, client_id):
    """An aborted change never was; an open one is neither seen nor waited for."""
    codec = RecordCodec("client")

    def record(customer):
        return client_id, codec.encode(client_to_record(Client(client_id, stripe_customer_id=customer)))

    write(settings, [record("cus_aborted")], end="abort")
    with ClientRegistry(settings) as registry:
        registry.wait_until_caught_up(READ_S_MAX)
        assert registry.get(client_id) is None

        write(settings, [record("cus_committed")], end="commit")
        registry.wait_until_caught_up(READ_S_MAX)
        assert registry.get(client_id).stripe_customer_id == "cus_committed"

        with transaction(settings, [record("cus_open")]) as finish:
            registry.wait_until_caught_up(READ_S_MAX)
            assert registry.get(client_id).stripe_customer_id == "cus_committed"
            finish()
        registry.wait_until_caught_up(READ_S_MAX)
        assert registry.get(client_id).stripe_customer_id == "cus_open"


def test_a_foreign_record_changes_nothing(settings, client_id):
    """One record that is no client, or another client's, must not stop the billing of all."""
    other = RecordCodec("client").encode(client_to_record(Client("somebody-else")))
    with ClientRegistry(settings) as registry:
        registry.put(Client(client_id, updated_by="test"))
        registry.wait_until_caught_up(READ_S_MAX)
        before = registry.rejected
        write(settings, [(client_id, b"\x00no avro"), (client_id, other)])
        registry.wait_until_caught_up(READ_S_MAX)

        assert registry.rejected == before + 2
        assert registry.get(client_id) == Client(client_id, updated_by="test")
