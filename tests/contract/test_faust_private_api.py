"""What streaming/ relies on in faust, mode and aiokafka, private parts included, stands still.

A new version of any of them makes one of these red before it makes a worker wrong. Then read
app/meterline/streaming against the new source, and only then change what is pinned here.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import faust
import mode
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, conn
from aiokafka.consumer import fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import (
    Assignment,
    SubscriptionState,
    TopicPartitionState,
)
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.structs import TopicPartition
from faust.assignor.partition_assignor import PartitionAssignor
from faust.serializers.schemas import Schema
from faust.stores.memory import Store as MemoryStore
from faust.tables import recovery
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer as BaseConsumer
from faust.transport.drivers import aiokafka as driver

from meterline.settings import Settings
from meterline.streaming.app import WorkerPlan, build_app
from meterline.streaming.chunks import RecordChunk, RecordChunkSchema
from meterline.streaming.consumer import ChunkConsumer, ChunkTransport, CommittedChunksThread
from meterline.streaming.engine import EngineLimits
from meterline.streaming.tables import CommittedStore, CommittedTable, CommittedTables

VERSIONS = {"faust-streaming": "0.15.3", "mode-streaming": "0.7.1", "aiokafka": "0.14.0"}
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

PLAN = WorkerPlan(
    name="contract",
    source_topic="usage.events",
    other_topics=(),
    limits=EngineLimits(0.1, 1_000, 1.0),
    web_port=6066,
    open=None,
    before_fencing=None,
    close=None,
)

SIGNATURES = {
    # Overridden: called by Faust with these.
    driver.AIOKafkaConsumerThread._create_worker_consumer: "transport",
    driver.AIOKafkaConsumerThread._fetch_records: "consumer active_partitions timeout max_records",
    driver.AIOKafkaConsumerThread._seek_wait: "consumer partitions",
    driver.AIOKafkaConsumerThread.seek_to_committed: "",
    driver.Consumer._new_consumer_thread: "",
    driver.Consumer._add_gap: "tp offset_from offset_to",
    driver.Consumer._new_offset: "tp",
    driver.Consumer.perform_seek: "",
    driver.Consumer.on_partitions_revoked: "revoked",
    Recovery.need_recovery: "",
    faust.Table.on_recovery_completed: "active_tps standby_tps",
    Schema.loads_key: "app message loads serializer",
    Schema.loads_value: "app message loads serializer",
    # Called by us.
    driver.Consumer.seek_wait: "partitions",
    driver.Consumer.assignment: "",
    Assignment.state_value: "tp",
    GroupCoordinator.check_errors: "",
    AIOKafkaProducer.begin_transaction: "",
    AIOKafkaProducer.commit_transaction: "",
    AIOKafkaProducer.create_batch: "",
    AIOKafkaProducer.send_batch: "batch topic partition",
    BatchBuilder.append: "timestamp key value headers",
    BatchBuilder.close: "",
    faust.Stream.noack: "",
    faust.Stream.events: "",
}

OVERRIDES = [
    (
        CommittedChunksThread,
        driver.AIOKafkaConsumerThread,
        {
            "_current_assignment",
            "_known_positions",
            "_let_the_broker_gather",
            "caught_up",
            "group_failure",
            "log_end",
        },
    ),
    (ChunkConsumer, driver.Consumer, {"_positions", "caught_up", "group_failure", "log_end", "seek_soon"}),
    (ChunkTransport, driver.Transport, set()),
    (CommittedTables, TableManager, set()),
    (CommittedTable, faust.Table, {"committed"}),
    (CommittedStore, MemoryStore, {"data"}),
    (RecordChunkSchema, Schema, set()),
]
"""Our class, Faust's, and what is ours alone; anything else we define must replace something of Faust's."""


@pytest.mark.parametrize(("package", "expected"), VERSIONS.items())
def test_versions_are_installed_and_pinned(package, expected):
    """Exactly these; a range would let an install change what money runs on."""
    requirements = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    (requirement,) = [line for line in requirements if re.split(r"[\[=<>]", line)[0] == package]

    assert version(package) == expected
    assert requirement.partition("==")[2] == expected


@pytest.mark.parametrize(
    ("function", "expected"), SIGNATURES.items(), ids=[function.__qualname__ for function in SIGNATURES]
)
def test_signatures(function, expected):
    """Names and order of the parameters."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    assert names == expected.split()


@pytest.mark.parametrize(
    "function",
    [
        driver.AIOKafkaConsumerThread._fetch_records,
        driver.AIOKafkaConsumerThread._seek_wait,
        driver.AIOKafkaConsumerThread.seek_to_committed,
        driver.Consumer._add_gap,
        driver.Consumer.perform_seek,
        driver.Consumer.seek_wait,
        driver.Consumer.on_partitions_revoked,
        faust.Table.on_recovery_completed,
        AIOKafkaProducer.begin_transaction,
        AIOKafkaProducer.commit_transaction,
        AIOKafkaProducer.send_batch,
    ],
    ids=lambda function: function.__qualname__,
)
def test_coroutines_are_coroutines(function):
    """Awaited by us or by Faust. A decorator may hide that in the function itself."""
    assert inspect.iscoroutinefunction(inspect.unwrap(function))


@pytest.mark.parametrize(
    ("ours", "theirs", "own"), OVERRIDES, ids=lambda value: getattr(value, "__name__", "")
)
def test_overrides_replace_something(ours, theirs, own):
    """A renamed method of Faust's would leave ours uncalled, and its rule silently gone."""
    defined = {name for name, value in vars(ours).items() if not name.startswith("__") and callable(value)}
    defined |= {name for name, value in vars(ours).items() if isinstance(value, property | staticmethod)}

    assert {name for name in defined if not hasattr(theirs, name)} == own


def test_a_partitions_state_has_what_the_idle_check_reads():
    """Position, last stable offset, high watermark and the time of the last poll."""

    async def run():
        subscriptions = SubscriptionState()
        tp = TopicPartition("t", 0)
        subscriptions.assign_from_user({tp})
        assignment = subscriptions.subscription.assignment
        state = assignment.state_value(tp)
        fresh = state.has_valid_position, state.lso, state.highwater, state.timestamp
        state.reset_to(7)
        return fresh, state.has_valid_position, state.position, isinstance(state, TopicPartitionState)

    assert asyncio.run(run()) == ((False, None, None, None), True, 7, True)


def test_the_time_of_the_last_poll_is_in_milliseconds():
    """It is compared with our clock in milliseconds."""
    assert "now_ms = int(1000 * time.time())" in inspect.getsource(fetcher)


def test_the_fetcher_asks_anew_how_long_the_broker_may_gather():
    """With each request; we change it between them."""
    source = inspect.getsource(fetcher.Fetcher._get_actions_per_node)

    assert "self._fetch_max_wait_ms" in source
    assert "self._fetch_min_bytes" in source


def test_faust_ties_read_committed_to_exactly_once():
    """The reason why it is set by hand: nothing else of Faust's can."""
    source = inspect.getsource(driver.AIOKafkaConsumerThread._create_worker_consumer)

    assert 'isolation_level: str = "read_uncommitted"' in source
    assert "if self.consumer.in_transaction:" in source


def test_aiokafkas_fetcher_is_built_after_the_isolation_level_is_set():
    """The consumer hands it on in start(), so that setting it after the constructor is in time."""
    assert "isolation_level=self._isolation_level" in inspect.getsource(AIOKafkaConsumer.start)
    assert "isolation_level=self._isolation_level" not in inspect.getsource(AIOKafkaConsumer.__init__)


def test_aiokafkas_connections_take_their_limit_from_the_module():
    """`read_whole_answers` sets it there; a name that is gone would be set without a word, and cost CPU."""
    assert hasattr(conn, "READER_LIMIT")
    assert "StreamReader(limit=READER_LIMIT" in inspect.getsource(conn.AIOKafkaConnection.connect)


def test_the_consumers_bookkeeping_has_its_names():
    """Cleared and set by us: acknowledged offsets, read and committed positions by partition."""
    source = inspect.getsource(BaseConsumer.__init__)
    names = ["_acked", "_acked_index", "_read_offset", "_committed_offset"]

    assert [name for name in names if f"self.{name} = defaultdict(" not in source] == []


def test_recovery_waits_for_the_tables_then_seeks_then_lets_records_flow():
    """`take_over` hangs on this order: state is restored, then our position is sought, then delivery."""
    source = inspect.getsource(Recovery.on_recovery_completed)
    steps = [
        "table.on_recovery_completed(",
        "await asyncio.wait(callback_coros)",
        "consumer.perform_seek()",
        "self.app.flow_control.resume()",
        "consumer.resume_flow()",
    ]

    assert [step for step in steps if step not in source] == []
    assert sorted(steps, key=source.index) == steps


def test_faust_asks_whether_there_is_anything_to_recover():
    """Our answer is no; asked anywhere else than in this one condition it might mean something else."""
    source = inspect.getsource(recovery)

    assert source.count("if self.need_recovery():") == 1
    assert source.count("need_recovery()") == 2  # and `if self.in_recovery and not ...`, which never begins


def test_the_memory_store_drops_the_keys_of_lost_partitions_by_their_partition():
    """It knows of none here: the engine drops a lost partition's state as a whole."""
    source = inspect.getsource(MemoryStore.on_recovery_completed)

    assert source.count("self.data") == 1
    assert "in self._key_partition.items()" in source


def test_the_table_shows_what_the_engine_holds():
    """Read through Faust as any table is; nobody but the engine changes it."""

    async def run():
        table = build_app(PLAN, Settings()).tables["state"]
        table.committed[0], table.committed[3] = {b"a": b"1"}, {b"d": b"4"}
        await table.data.on_recovery_completed({TopicPartition("t", 0)}, set())
        before = table[b"a"], b"d" in table, len(table)
        with pytest.raises(TypeError, match="item assignment"):
            table.data[b"a"] = b"2"
        del table.committed[3]
        return before, b"d" in table, dict(table.items())

    assert asyncio.run(run()) == ((b"1", True, 2), False, {b"a": b"1"})


def test_a_chunk_passes_for_one_record():
    """Faust reads these attributes of a fetched record; all must be there."""
    source = inspect.getsource(driver.AIOKafkaConsumerThread) + inspect.getsource(driver.Consumer._to_message)
    read = set(re.findall(r"record\.(\w+)", source))
    used = {name for name in read if name in RecordChunk.__slots__}

    assert "value" in used
    assert read <= set(RecordChunk.__slots__)


def test_the_app_is_built_of_our_parts():
    """Table manager, table, transport, consumer and its thread; the consumer reads committed records."""

    async def build():
        app = build_app(PLAN, Settings())
        thread = app.consumer._new_consumer_thread()
        consumer = thread._create_worker_consumer(app.transport)
        return (
            type(app.tables),
            type(app.tables["state"]),
            type(app.transport),
            type(app.consumer),
            type(thread),
            consumer._isolation_level,
            consumer._enable_auto_commit,
            app.tables.recovery.need_recovery(),
            app.tables["state"].changelog_topic.get_topic_name(),
        )

    assert asyncio.run(build()) == (
        CommittedTables,
        CommittedTable,
        ChunkTransport,
        ChunkConsumer,
        CommittedChunksThread,
        "read_committed",
        False,
        False,
        "contract-state-changelog",
    )


def test_a_crash_of_the_agent_ends_the_worker():
    """Restarting it would go on behind a record that was lost in the crash."""
    assert issubclass(mode.CrashingSupervisor, mode.SupervisorStrategy)
    assert "crash" in inspect.getsource(mode.CrashingSupervisor)


@pytest.mark.parametrize("id_", ["pod-1", "räck 3/b"])
def test_a_static_member_keeps_its_address_on_another_port(monkeypatch, id_):
    """Faust refuses the assignment that the broker kept for it if it is addressed to another one."""
    monkeypatch.setenv("METERLINE_WORKER__INSTANCE_ID", id_)
    addresses = set()
    for port in ("6066", "7066"):
        monkeypatch.setenv("METERLINE_WORKER__WEB_PORT", port)
        addresses.add(str(build_app(PLAN, Settings()).conf.canonical_url))
    monkeypatch.setenv("METERLINE_WORKER__INSTANCE_ID", "another")
    addresses.add(str(build_app(PLAN, Settings()).conf.canonical_url))

    assert len(addresses) == 2
    assert "assert metadata.url == str(self._url)" in inspect.getsource(PartitionAssignor.on_assignment)
