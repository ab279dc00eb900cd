"""What the engine relies on in Kafka holds for a real broker and for the simulated one alike.

Records are sums of credits: what a reader takes for the state of a client is the money.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)
from tests.simulation.broker import Fetched
from tests.simulation.kafka_client import SimulatedLog
from tests.simulation.lone_process import LoneProcess

from meterline.streaming.broker_log import KafkaLog
from meterline.streaming.owner import Commit, Output
from meterline.streaming.transactions import FencedProducer, aiokafka_config

pytestmark = pytest.mark.timeout(120)

PATIENCE_S = 60.0
"""Markers take milliseconds, a round of the cleaner a second; a busy machine longer."""


class Kafka:
    """The session's broker, with two topics of the test's own: `state`, compacted, and `sums`."""

    def __init__(self, settings, unique):
        self.kafka = settings.kafka
        self.names = {name: unique(name) for name in ("state", "sums")}
        self._admin = AdminClient(self.kafka.client_config())
        compacted = {
            "cleanup.policy": "compact",
            "segment.ms": "100",
            "min.cleanable.dirty.ratio": "0.001",
            "message.timestamp.type": "LogAppendTime",
        }
        plain = {"message.timestamp.type": "LogAppendTime"}
        self._wait(
            self._admin.create_topics(
                [
                    NewTopic(self.names["state"], 1, 1, config=compacted),
                    NewTopic(self.names["sums"], 1, 1, config=plain),
                ]
            )
        )

    def close(self):
        # aiokafka leaves futures behind that nobody asks; Python complains of them here, not amid other work.
        gc.collect()
        self._wait(self._admin.delete_topics(list(self.names.values())))

    @staticmethod
    def _wait(futures):
        for future in futures.values():
            future.result(30)

    def run(self, story):
        async def told():
            self.log = KafkaLog(self.kafka)
            try:
                return await story(self)
            finally:
                self.log.close()

        return asyncio.run(told())

    async def append(self, topic, key, value):
        def send():
            producer = Producer(self.kafka.client_config() | {"linger.ms": 0})
            producer.produce(self.names[topic], value, key, partition=0)
            assert producer.flush(30) == 0

        await asyncio.to_thread(send)

    async def fetch(self, topic, position=0):
        place = TopicPartition(self.names[topic], 0)
        consumer = AIOKafkaConsumer(
            **aiokafka_config(self.kafka), isolation_level="read_committed", enable_auto_commit=False
        )
        await consumer.start()
        try:
            consumer.assign([place])
            consumer.seek(place, position)
            records = []
            while True:
                for found in (await consumer.getmany(place, timeout_ms=50)).values():
                    records += found
                position = await consumer.position(place)
                stable = consumer.last_stable_offset(place)
                if stable is not None and position >= stable:
                    return Fetched(records, position, stable, consumer.highwater(place))
        finally:
            await consumer.stop()

    async def compact(self, topic):
        """Let the cleaner come by at once, and again until the first segment is clean."""
        broker = ConfigResource(
            ResourceType.BROKER,
            str(next(iter(self._admin.list_topics(timeout=10).brokers))),
            incremental_configs=[
                ConfigEntry("log.cleaner.backoff.ms", "100", incremental_operation=AlterConfigOpType.SET)
            ],
        )
        self._wait(self._admin.incremental_alter_configs([broker]))
        before = len((await self.fetch(topic)).records)
        ends = time.monotonic() + PATIENCE_S
        while len((await self.fetch(topic)).records) >= before:
            assert time.monotonic() < ends, "the cleaner never came"
            await asyncio.sleep(0.2)
            await self.append(topic, b"other", b"")  # rolls the segment
            before += 1

    async def pause(self):
        await asyncio.sleep(0.02)


class Simulated:
    """The broker of tests/simulation."""

    def __init__(self):
        self.names = {"state": "state", "sums": "sums"}

    def close(self):
        """Nothing is held."""

    def run(self, story):
        with LoneProcess() as self.process:
            self.broker = self.process.world.broker
            self.log = SimulatedLog(self.process.world, self.process)
            return self.process.run(story(self))

    async def append(self, topic, key, value):
        self.broker.append(topic, 0, key, value)

    async def fetch(self, topic, position=0):
        return (await self.log.fetch(topic, {0: position}, 1_000))[0]

    async def compact(self, topic):
        self.broker.compact(topic, 0, 10**9)

    async def pause(self):
        await asyncio.sleep(0.02)


@pytest.fixture(params=["simulated", pytest.param("kafka", marks=pytest.mark.stack)])
def broker(request):
    if request.param == "simulated":
        yield Simulated()
        return
    kafka = Kafka(request.getfixturevalue("settings"), request.getfixturevalue("unique"))
    yield kafka
    kafka.close()


# -- the words of the stories below


async def owner(broker):
    """A started producer of the one partition; all before it are refused from now on."""
    producer = FencedProducer(
        broker.log.transactional_client(f"{broker.names['state']}-0"), broker.names["state"], 0
    )
    await producer.start()
    return producer


def sums(broker, **credits_micro):
    """A commit after which clients' sums are these; the second topic hears of it."""
    state = [(client.encode(), str(amount).encode()) for client, amount in credits_micro.items()]
    outputs = [Output(broker.names["sums"], 0, key, value) for key, value in state]
    return Commit(state, outputs, 0)


async def half_done(producer, commit):
    """Everything of a commit but its end."""
    client = producer._producer
    await client.begin_transaction()
    batch = client.create_batch()
    for key, value in commit.changelog:
        batch.append(key=key, value=value, timestamp=None, headers=[])
    batch.close()
    await (await client.send_batch(batch, producer._changelog, partition=0))


async def state(broker):
    return await broker.log.read_state(broker.names["state"], 0)


async def settled(broker, topic, position=0):
    """A fetch, once no transaction is open: markers follow a decision within milliseconds."""
    ends = time.monotonic() + PATIENCE_S
    while True:
        fetched = await broker.fetch(topic, position)
        if fetched.stable == fetched.end:
            return fetched
        assert time.monotonic() < ends
        await broker.pause()


def values(fetched):
    return [record.value for record in fetched.records]


# -- the contract


def test_records_follow_one_another_and_are_stamped_in_order(broker):
    async def story(broker):
        before = await broker.log.read_ranges(broker.names["sums"], [0])
        for number in range(3):
            await broker.append("sums", b"acme", b"%d" % number)
        after = await broker.log.read_ranges(broker.names["sums"], [0])
        return before[0], after[0], await broker.fetch("sums")

    before, after, fetched = broker.run(story)

    assert (before.start_offset, before.end_offset) == (0, 0)
    assert (after.start_offset, after.end_offset) == (0, 3)
    assert (before.topic_id, before.partition, before.topic) == (after.topic_id, 0, broker.names["sums"])
    assert [record.offset for record in fetched.records] == [0, 1, 2]
    times = [record.timestamp for record in fetched.records]
    assert times == sorted(times)
    assert (fetched.position, fetched.stable, fetched.end) == (3, 3, 3)


def test_what_is_committed_is_read_and_its_marker_takes_an_offset(broker):
    """In every topic of the transaction; a position passes the marker."""

    async def story(broker):
        producer = await owner(broker)
        await producer.transact(sums(broker, acme=5, zoo=7))
        fetched = await settled(broker, "sums"), await settled(broker, "state"), await state(broker)
        await producer.stop()
        return fetched

    said, changelog, credits_micro = broker.run(story)

    assert values(said) == values(changelog) == [b"5", b"7"]
    assert [(f.position, f.stable, f.end) for f in (said, changelog)] == [(3, 3, 3)] * 2
    assert credits_micro == {b"acme": b"5", b"zoo": b"7"}


def test_an_open_transaction_hides_itself_and_all_behind_it(broker):
    """Position = last stable offset, and the end is further: not caught up."""

    async def story(broker):
        producer = await owner(broker)
        await broker.append("state", b"acme", b"5")
        await half_done(producer, sums(broker, acme=12))
        await broker.append("state", b"zoo", b"1")
        ranges = await broker.log.read_ranges(broker.names["state"], [0])
        hidden = await broker.fetch("state"), await state(broker), ranges[0].end_offset
        await producer._producer.commit_transaction()
        shown = await settled(broker, "state"), await state(broker)
        await producer.stop()
        return hidden, shown

    (fetched, credits_micro, end), (later, credits_later) = broker.run(story)

    assert values(fetched) == [b"5"]
    assert (fetched.position, fetched.stable, fetched.end) == (1, 1, 3)
    assert credits_micro == {b"acme": b"5"}
    assert end == 1
    assert values(later) == [b"5", b"12", b"1"]
    assert credits_later == {b"acme": b"12", b"zoo": b"1"}


def test_the_next_owner_aborts_what_is_open_before_it_reads(broker):
    """Its start returns when the end is decided; the aborted records leave a gap."""

    async def story(broker):
        first = await owner(broker)
        await first.transact(sums(broker, acme=5))
        await half_done(first, sums(broker, acme=7))
        second = await owner(broker)
        credits_micro = await state(broker)
        await second.transact(sums(broker, acme=12))
        fetched = await settled(broker, "state")
        await second.stop()
        await first.stop()
        return credits_micro, fetched

    credits_micro, fetched = broker.run(story)

    assert credits_micro == {b"acme": b"5"}
    assert values(fetched) == [b"5", b"12"]
    assert [record.offset for record in fetched.records] == [0, 4]


@pytest.mark.parametrize("has_begun", [False, True], ids=["before begin", "between produce and commit"])
def test_an_owner_that_was_replaced_changes_no_credit(broker, has_begun):
    """Whatever it tries is refused; the new owner has counted these records already, and more."""

    async def story(broker):
        old = await owner(broker)
        await old.transact(sums(broker, acme=5))
        if has_begun:
            await half_done(old, sums(broker, acme=7))
        new = await owner(broker)
        await new.transact(sums(broker, acme=12))
        refused = None
        try:
            await (old._producer.commit_transaction() if has_begun else old.transact(sums(broker, acme=7)))
        except Exception as error:  # noqa: BLE001 - which one depends on where it was (docs of aiokafka)
            refused = error
        found = await state(broker), await settled(broker, "sums")
        await new.stop()
        await old.stop()
        return refused, *found

    refused, credits_micro, said = broker.run(story)

    assert credits_micro == {b"acme": b"12"}
    assert values(said) == [b"5", b"12"]
    assert refused is not None


def test_a_commit_of_unknown_outcome_is_all_or_nothing_for_the_next_owner(broker):
    """The process dies with the commit on its way: the next start decides, and it stays so."""

    async def story(broker):
        first = await owner(broker)
        await first.transact(sums(broker, acme=5, zoo=5))
        await half_done(first, sums(broker, acme=7, zoo=7))
        commit = asyncio.ensure_future(first._producer.commit_transaction())
        await asyncio.sleep(0.001)
        commit.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await commit
        second = await owner(broker)
        found = [await state(broker)]
        await broker.pause()
        found.append(await state(broker))
        await second.stop()
        await first.stop()
        return found

    first, second = broker.run(story)

    assert first == second
    assert first in ({b"acme": b"5", b"zoo": b"5"}, {b"acme": b"7", b"zoo": b"7"})


def test_a_deleted_key_is_no_state(broker):
    async def story(broker):
        producer = await owner(broker)
        await producer.transact(sums(broker, acme=5, zoo=7))
        await producer.transact(Commit([(b"acme", None)], (), 0))
        credits_micro = await state(broker)
        await producer.stop()
        return credits_micro

    assert broker.run(story) == {b"zoo": b"7"}


def test_compaction_changes_no_state_and_moves_no_record(broker):
    """Old values go, the newest one of each key stays, at its offset; an aborted one replaces nothing."""

    async def story(broker):
        producer = await owner(broker)
        for amount in range(1, 6):
            await producer.transact(sums(broker, acme=amount, zoo=10 * amount))
        await half_done(producer, sums(broker, acme=99))
        second = await owner(broker)
        await settled(broker, "state")
        before = await broker.fetch("state")
        await broker.compact("state")
        after = await broker.fetch("state"), await state(broker)
        await second.stop()
        await producer.stop()
        return before, *after

    before, after, credits_micro = broker.run(story)

    credits_micro.pop(b"other", None)
    assert credits_micro == {b"acme": b"5", b"zoo": b"50"}
    kept = {(record.offset, record.value) for record in after.records if record.key != b"other"}
    everything = {(record.offset, record.value) for record in before.records}
    assert kept < everything
    assert after.end >= before.end
