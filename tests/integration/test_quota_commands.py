"""`meterline quota` on real Kafka, Valkey and ClickHouse; the quota worker's part is played by hand."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from tests.ledger_rows import columns_of, event
from tests.stacks import chosen_kind, running_stack
from tests.worker_processes import WorkerProcess, ended_in_the_end

from meterline.cli import quota as command
from meterline.cli import quota_orders
from meterline.cli.main import main
from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import progress_key, progress_to_record, total_key, total_to_record
from meterline.contracts.topics import CREDIT_GRANTS, USAGE_TOTALS
from meterline.domain.totals import UsageProgress, UsageTotal
from meterline.domain.windows import SkuTotal
from meterline.ledger.client import connect
from meterline.ledger.migrate import apply_migrations
from meterline.ledger.tables import EVENTS, QUOTA_CHANGE_LOG
from meterline.ledger.writer import LedgerWriter
from meterline.quota import CreditsExhausted, giving
from meterline.quota.keys import SHARDS, Keys
from meterline.quota.scripts import Scripts
from meterline.task import Meter

pytestmark = pytest.mark.stack

MICRO = 1_000_000
TTL_MS = 3_600_000


class Place:
    """One installation of credit buckets: its own Redis namespace, on the shared topics."""

    def __init__(self, settings, client, topic_id):
        self.settings = settings
        self.client = client
        self.topic_id = topic_id
        self.keys = Keys(settings.redis.namespace)
        self.redis = Redis.from_url(settings.redis.url, decode_responses=True)
        self.producer = Producer(settings.kafka.client_config())

    def scripts(self, call):
        """Run an asynchronous call with the scripts of this place."""

        async def run():
            redis = AsyncRedis.from_url(self.settings.redis.url)
            try:
                return await call(Scripts(redis, namespace=self.settings.redis.namespace))
            finally:
                await redis.aclose()

        return asyncio.run(run())

    def begin(self, generation, *, is_open=True):
        """What the quota worker does first, on all shards."""

        async def call(scripts):
            words = ("begin", generation, 1, self.topic_id, 0)
            await scripts.on_shards(dict.fromkeys(range(SHARDS), words))
            if is_open:
                await scripts.on_shards(dict.fromkeys(range(SHARDS), ("open", generation)))

        self.scripts(call)

    def ops(self, *ops):
        """Operations on the client's bucket; their answers."""
        return self.scripts(lambda scripts: scripts.run_ops(self.client, ops))

    def publish_total(self, cutoff, credits_micro, events=1):
        total = UsageTotal(self.topic_id, 0, self.client, cutoff, SkuTotal(events, credits_micro))
        value = RecordCodec("usage-total").encode(total_to_record(total))
        self.producer.produce(USAGE_TOTALS, value, total_key(self.topic_id, 0, self.client), 0)
        assert self.producer.flush(10) == 0

    def publish_progress(self, published, accounted=1_795_521_600_000):
        """Says it on the topic and, as the quota worker does, to every shard."""
        progress = UsageProgress(self.topic_id, 0, accounted, published)
        value = RecordCodec("usage-progress").encode(progress_to_record(progress))
        self.producer.produce(USAGE_TOTALS, value, progress_key(self.topic_id, 0), 0)
        assert self.producer.flush(10) == 0

        async def call(scripts):
            generation = (await scripts.look(0)).generation
            words = ("progress", generation, self.topic_id, 0, published, accounted)
            await scripts.on_shards(dict.fromkeys(range(SHARDS), words))

        self.scripts(call)

    def add_events(self, *rows):
        """Rows of the ledger: (offset, credits, reservation id)."""

        async def insert():
            writer = LedgerWriter(self.settings.clickhouse)
            now_ms = time.time_ns() // 1_000_000
            known = {"topic_id": self.topic_id, "client_id": self.client, "occurred_at": now_ms}
            events = [
                event(offset, credits_micro=micro, reservation_id=rid, **known) for offset, micro, rid in rows
            ]
            for _ in range(2):  # a repeated insert must change no sum
                await writer.insert(EVENTS, *columns_of(events))
            await writer.close()

        asyncio.run(insert())

    def changes(self):
        ledger = connect(self.settings.clickhouse)
        found = ledger.execute(
            "SELECT action, client_id, reservation_id, credits_micro, changed_by, reason, detail"
            " FROM quota_changes"
        )
        ledger.disconnect()
        return found


@pytest.fixture(scope="module")
def database(stack):
    """A ledger of this file's own: its clients are, too, and only the changes are emptied for each test."""
    own = stack.settings.clickhouse.model_copy(update={"database": "quota_commands"})
    apply_migrations(own)
    yield own
    client = connect(own)
    client.execute(f"DROP DATABASE {own.database}")
    client.disconnect()


@pytest.fixture
def place(settings, database, unique):
    own = settings.model_copy(
        update={
            "clickhouse": database,
            "redis": settings.redis.model_copy(update={"namespace": unique("quota")}),
        }
    )
    client = connect(database)
    client.execute(f"TRUNCATE TABLE {QUOTA_CHANGE_LOG}")
    client.disconnect()
    made = Place(own, unique("client"), unique("topic"))
    yield made
    for key in made.redis.scan_iter(match=f"{own.redis.namespace}:*", count=1_000):
        made.redis.delete(key)
    made.redis.close()


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Run `meterline quota`: exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["meterline", "quota", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        else:
            code = 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def quota(place, command_line, monkeypatch):
    """The same, pointed at the place."""
    monkeypatch.setenv("METERLINE_KAFKA__BOOTSTRAP_SERVERS", place.settings.kafka.bootstrap_servers)
    monkeypatch.setenv("METERLINE_REDIS__URL", place.settings.redis.url)
    monkeypatch.setenv("METERLINE_REDIS__NAMESPACE", place.settings.redis.namespace)
    monkeypatch.setenv("METERLINE_CLICKHOUSE__HOST", place.settings.clickhouse.host)
    monkeypatch.setenv("METERLINE_CLICKHOUSE__PORT", str(place.settings.clickhouse.port))
    monkeypatch.setenv("METERLINE_CLICKHOUSE__DATABASE", place.settings.clickhouse.database)
    return command_line


@pytest.fixture
def used(place):
    """10 granted, 3 used, 1 settled and not yet in a total, 2 reserved; the ledger has what the log says."""
    place.begin(5)
    place.ops(["G", "g1", 10 * MICRO], ["T", place.topic_id, 0, 6, 3 * MICRO])
    place.ops(["r", "work", 2 * MICRO, TTL_MS], ["r", "done", MICRO, TTL_MS])
    place.ops(["s", "done", [[place.topic_id, 0, 9, MICRO]], 1])
    place.add_events((2, MICRO, "a"), (6, 2 * MICRO, "b"), (9, MICRO, "done"))
    place.publish_total(2, MICRO)
    place.publish_total(6, 3 * MICRO, events=2)
    place.publish_progress(6)
    return place


def grants_of(place):
    """The client's records on credit.grants."""
    consumer = Consumer(place.settings.kafka.client_config() | {"group.id": place.client})
    count = len(consumer.list_topics(CREDIT_GRANTS, 10).topics[CREDIT_GRANTS].partitions)
    partition = partition_for(place.client.encode(), count)
    consumer.assign([TopicPartition(CREDIT_GRANTS, partition, 0)])
    _, end = consumer.get_watermark_offsets(TopicPartition(CREDIT_GRANTS, partition), 10)
    codec, found = RecordCodec("credit-grant"), []
    for _ in range(end):
        message = consumer.poll(10)
        if message.key() == place.client.encode():
            found.append(codec.decode(message.value()))
    consumer.close()
    return found


def test_a_grant_is_an_event_that_names_who_and_why(place, quota):
    code, out, _ = quota(
        "grant", place.client, "12.5", "--reason", "invoice 7", "--by", "ann", "--grant-id", "inv-7"
    )

    (record,) = grants_of(place)
    assert code == 0
    assert "12.5 credits until they are used" in out
    assert (record["grant_id"], record["kind"], record["credits_micro"]) == ("inv-7", "prepaid", 12_500_000)
    assert (record["granted_by"], record["reason"], record["period_start"]) == ("ann", "invoice 7", None)


def test_a_budget_begins_with_the_clients_billing_period(place, quota):
    code, out, _ = quota(
        "grant", place.client, "100", "--budget", "--from", "2026-12-24", "--reason", "c", "--json"
    )

    (record,) = grants_of(place)
    assert code == 0
    assert json.loads(out)["period_start"] == "2026-12-01T00:00:00Z"
    assert (record["kind"], record["period_start"]) == ("budget", 1_796_083_200_000)


def test_a_grant_can_be_waited_for(place, quota, monkeypatch):
    """Until the bucket knows it and decides; one that is late is told, and on the log all the same."""
    place.begin(5)
    place.ops(["G", "there", 10 * MICRO])
    monkeypatch.setattr(command, "USABLE_S_MAX", 0.5)

    assert quota("grant", place.client, "10", "--reason", "x", "--grant-id", "there", "--wait")[0] == 0
    code, _, err = quota("grant", place.client, "10", "--reason", "x", "--grant-id", "missing", "--wait")
    assert (code, "missing is on the log" in err) == (2, True)
    assert [record["grant_id"] for record in grants_of(place)] == ["there", "missing"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0", "--reason", "x"], "more than 0"),
        (["1e-7", "--reason", "x"], "finer than a micro-credit"),
        (["ten", "--reason", "x"], "not a decimal number"),
        (["5", "--reason", " "], "Say why"),
        (["5", "--reason", "x", "--from", "2026-12-01"], "belongs to --budget"),
    ],
)
def test_a_grant_that_cannot_be_is_refused_and_nothing_written(place, quota, arguments, said):
    code, _, err = quota("grant", place.client, *arguments)

    assert (code, grants_of(place)) == (2, [])
    assert said in err


def test_without_kafka_a_grant_says_how_to_repeat_it(place, quota, monkeypatch):
    monkeypatch.setenv("METERLINE_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setattr(giving, "ANSWER_S_MAX", 2.0)  # nobody is there: none comes in 10 s either
    code, _, err = quota("grant", place.client, "5", "--reason", "x", "--grant-id", "g-9")

    assert code == 1
    assert "meterline up" in err
    assert "--grant-id g-9" in err


def test_the_balance_says_all_that_makes_it(used, quota):
    code, out, _ = quota("balance", used.client, "--json")

    assert code == 0
    assert json.loads(out) == {
        "client_id": used.client,
        "granted": "10",
        "consumed": "3",
        "provisional": "1",
        "reserved": "2",
        "available": "4",
        "open": True,
        "generation": 5,
        "period_start": None,
    }
    assert "available" in quota("balance", used.client)[1]
    assert quota("balance", "nobody")[0] == 1


def test_a_bucket_of_an_older_generation_is_none(used, quota):
    """Nothing in it counts any more; it is rebuilt by what the quota worker says to the new generation."""
    used.begin(6, is_open=False)

    assert quota("balance", used.client)[0] == 1
    assert quota("list", "--json")[1].strip() == "[]"


def test_the_list_has_every_bucket_of_this_namespace(used, quota):
    rows = json.loads(quota("list", "--json")[1])

    assert [row["client_id"] for row in rows] == [used.client]
    assert used.client in quota("list")[1]


def test_a_restarted_server_is_told_as_closed(used, quota):
    """Its run id is not the one the generation began under."""
    used.redis.hset(used.keys.state(0), "run", "another")
    for shard in range(SHARDS):
        used.redis.hset(used.keys.state(shard), "run", "another")

    assert json.loads(quota("balance", used.client, "--json")[1])["open"] is False


def test_reservations_that_hold_and_settled_work_that_never_came_are_listed(used, quota):
    used.ops(["r", "lost", MICRO, TTL_MS], ["s", "lost", [[used.topic_id, 0, 5, MICRO]], 1])
    code, out, _ = quota("reservations", used.client, "--json")

    answer = json.loads(out)
    assert code == 0
    assert [(one["reservation_id"], one["holds"]) for one in answer["held"]] == [("work", "2")]
    assert 0 < answer["held"][0]["seconds_left"] <= TTL_MS / 1000
    (lost,) = answer["never_reached_the_log"]
    assert (lost["reservation_id"], lost["offset"]) == ("lost", 5), "`done` is beyond what is accounted"
    assert "not in the ledger: lost" in quota("reservations", used.client)[1]


def test_a_void_gives_back_and_leaves_who_and_why(used, quota):
    code, out, _ = quota("void", used.client, "work", "--reason", "machine lost", "--by", "ann")

    assert (code, "2 credits: voided" in out) == (0, True)
    assert json.loads(quota("balance", used.client, "--json")[1])["available"] == "6"
    assert used.changes() == [
        ("void", used.client, "work", 2 * MICRO, "ann", "machine lost", "voided"),
    ]


@pytest.mark.parametrize("reservation", ["done", "never"])
def test_what_holds_nothing_cannot_be_voided(used, quota, reservation):
    """And leaves no trace: an unknown id stays free to be reserved."""
    before = used.redis.hgetall(used.keys.reservations(used.client))
    code, _, err = quota("void", used.client, reservation, "--reason", "x")

    assert code == 1
    assert reservation in err
    assert used.redis.hgetall(used.keys.reservations(used.client)) == before
    assert used.changes() == []


def test_nothing_is_ordered_without_a_reason_or_a_ledger(used, quota, monkeypatch):
    assert quota("void", used.client, "work", "--reason", "")[0] == 2
    monkeypatch.setenv("METERLINE_CLICKHOUSE__PORT", "1")
    code, _, err = quota("void", used.client, "work", "--reason", "x")

    assert (code, "ClickHouse" in err) == (2, True)
    monkeypatch.undo()
    assert used.redis.hget(used.keys.reservations(used.client), "work").startswith("held ")


class Worker(threading.Thread):
    """Plays the quota worker: a heartbeat, and a new generation once a shard has lost its state."""

    def __init__(self, place):
        super().__init__(daemon=True)
        self.place = place
        self.stopping = threading.Event()

    def run(self):
        generation, beat = 5, 0
        while not self.stopping.wait(0.2):
            beat += 1
            if not self.place.redis.exists(self.place.keys.state(0)):
                generation += 1
                self.place.begin(generation, is_open=False)
                time.sleep(0.6)
                self.place.begin(generation + 1)
                generation += 1
            for shard in range(SHARDS):
                self.place.redis.hset(self.place.keys.state(shard), "beat", beat)


def test_a_rebuild_is_ordered_recorded_and_waited_for(used, quota):
    worker = Worker(used)
    worker.start()
    try:
        code, out, err = quota("rebuild", "--reason", "drill", "--by", "ann", "--timeout-s", "20")
    finally:
        worker.stopping.set()
        worker.join()

    assert (code, err) == (0, "")
    assert "Generation 5 is given up" in out
    assert "is open." in out
    assert used.changes() == [
        ("rebuild", "", "", 0, "ann", "drill", "ordered; generation 5 was given up"),
    ]


def test_a_rebuild_that_nobody_would_do_is_not_ordered(used, quota, monkeypatch):
    """Without a worker the buckets would be closed until one is started."""
    monkeypatch.setattr(quota_orders, "HEARTBEAT_S_MAX", 2.0)  # nobody is there: none comes in 15 s either
    code, _, err = quota("rebuild", "--reason", "drill")

    assert (code, "No quota worker runs" in err) == (2, True)
    assert used.redis.hget(used.keys.state(0), "open") == "1"
    assert used.changes() == []


@pytest.fixture
def granted(used, quota):
    """`used`, and the grant on the log."""
    assert quota("grant", used.client, "10", "--reason", "x", "--grant-id", "g1")[0] == 0
    return used


def checked(quota, place, *options):
    """The report, which must fit the exit code."""
    code, out, err = quota("check", place.client, "--wait-s", "1", "--json", *options)
    report = json.loads(out)
    assert code == (0 if report["equal"] else 1), err
    return report


def test_the_check_finds_everything_equal(granted, quota):
    report = checked(quota, granted)

    assert report["differences"] == []
    assert (report["buckets"], report["totals"], report["generation"]) == (1, 1, 5)
    assert "equal: yes" in quota("check", granted.client)[1]


def test_the_check_finds_a_changed_bucket(granted, quota):
    granted.redis.hincrby(granted.keys.bucket(granted.client), "granted", 1)

    assert [one["what"] for one in checked(quota, granted)["differences"]] == ["granted"]
    code, out, _ = quota("check", granted.client, "--wait-s", "0")
    assert (code, "equal: no, 1 differences" in out) == (1, True)


def test_the_check_finds_an_event_that_no_total_knows(granted, quota):
    granted.add_events((5, MICRO, "x"))

    (difference,) = checked(quota, granted)["differences"]
    assert "beside the ledger" in difference["what"]
    assert "3 events 4000000" in difference["expected"]


def test_the_check_finds_an_event_that_the_ledger_lost(granted, quota):
    ledger = connect(granted.settings.clickhouse)
    ledger.execute(
        "ALTER TABLE events DELETE WHERE topic_id = %(topic_id)s AND `offset` = 2"
        " SETTINGS mutations_sync = 1",
        {"topic_id": granted.topic_id},
    )
    ledger.disconnect()

    (difference,) = checked(quota, granted)["differences"]
    assert "1 events 2000000" in difference["expected"]


def test_the_check_finds_closed_buckets(granted, quota):
    granted.redis.hset(granted.keys.state(9), "open", "0")

    (difference,) = checked(quota, granted)["differences"]
    assert difference["found"] == "closed in 1 of 64 shards"


def test_the_check_finds_a_shard_that_says_more_than_the_log(granted, quota):
    granted.redis.hset(granted.keys.state(9), f"x:{granted.topic_id}:0", "7")

    assert checked(quota, granted)["differences"][0]["found"] == "offset 7"


def test_the_check_lists_what_no_reservation_covers(granted, quota):
    """Not a difference: the log charged it. But the client's policy wants a reservation."""
    granted.add_events((11, 4 * MICRO, None), (12, MICRO, None))
    report = checked(quota, granted)

    (usage,) = report["unreserved"]
    assert (report["equal"], usage["events"], usage["credits_micro"]) == (True, 2, 5 * MICRO)
    (term,) = [one for one in report["exposure"] if one["term"] == "without a reservation"]
    assert term["credits_micro"] == 5 * MICRO


def test_the_check_lists_settled_work_that_never_reached_the_log(granted, quota):
    granted.ops(["r", "lost", MICRO, TTL_MS], ["s", "lost", [[granted.topic_id, 0, 5, 3 * MICRO]], 1])
    report = checked(quota, granted)

    assert [(one["reservation_id"], one["offset"]) for one in report["lost"]] == [("lost", 5)]
    (term,) = [one for one in report["exposure"] if one["term"] == "used above what was reserved"]
    assert (report["equal"], term["credits_micro"]) == (True, 2 * MICRO)


def test_the_check_prints_debt_and_work_after_its_end(granted, quota):
    granted.ops(["r", "early", MICRO, TTL_MS], ["v", "early"])
    granted.add_events((14, 2 * MICRO, "early"))
    granted.ops(["s", "big", [[granted.topic_id, 0, 20, 9 * MICRO]], 1])
    terms = {one["term"]: one["credits_micro"] for one in checked(quota, granted)["exposure"]}

    assert terms["published after its reservation ended"] == 2 * MICRO
    assert terms["in debt now"] == 5 * MICRO


def test_the_check_gives_no_false_alarm_while_usage_is_in_flight(granted, quota):
    """Totals move in the ledger, on the log and in the bucket, one after the other, all the time."""
    stopping, offset, problems = threading.Event(), 20, []

    def flow():
        nonlocal offset
        micro, events = 3 * MICRO, 2
        granted.add_events((10, MICRO, "z"))
        micro, events = micro + 2 * MICRO, events + 2  # offset 9 of `done`, and 10
        while not stopping.is_set():
            try:
                offset += 1
                granted.add_events((offset, MICRO, "z"))
                micro, events = micro + MICRO, events + 1
                granted.publish_total(offset, micro, events)
                time.sleep(0.05)
                granted.ops(["T", granted.topic_id, 0, offset, micro], ["e"])
                granted.publish_progress(offset)
            except Exception as error:  # noqa: BLE001 - told by the test
                problems.append(error)
                return

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        reports = [checked(quota, granted, "--wait-s", "20") for _ in range(4)]
    finally:
        stopping.set()
        thread.join()

    assert problems == []
    assert [report["differences"] for report in reports] == [[], [], [], []]
    assert offset > 25, "usage did flow"


def test_alert_levels_of_a_client_are_set(place, quota, monkeypatch, capsys):
    """Ascending, each once; what is no percentage is refused."""

    def clients(*arguments):
        monkeypatch.setattr(sys, "argv", ["meterline", "clients", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    assert quota("list", "--json")[0] == 0  # points this process at the stack
    assert clients("set", place.client, "--alert-levels", "80,50,80")[0] in {0, None}
    rows = {row["client_id"]: row for row in json.loads(clients("list", "--json")[1])}
    assert rows[place.client]["alert_levels_percent"] == [50, 80]
    assert clients("set", place.client, "--alert-levels", "half")[0] == 2
    assert clients("set", place.client, "--alert-levels", "101")[0] == 2


@pytest.mark.timeout(600)
def test_from_a_grant_to_a_rebuild_with_the_real_workers(command_line, monkeypatch, tmp_path):
    """Give, use, check; rebuild by order, then lose Redis: each time the buckets are what the log says."""
    with running_stack(chosen_kind()) as own:
        short = {
            "METERLINE_QUOTA__RESERVATION_TTL_S": "10",
            "METERLINE_QUOTA__RESERVATION_TTL_MAX_S": "10",
            "METERLINE_QUOTA__TIMEOUT_MS": "20000",  # not what is tested, and the machine may be busy
            "METERLINE_QUOTA__SPOOL_DIR": str(tmp_path / "spool"),
        }
        for name, value in (dict(own.environment) | short).items():
            monkeypatch.setenv(name, value)
        environment = own.process_environment() | short
        workers = [WorkerProcess(kind, environment, tmp_path) for kind in ("metering", "quota")]
        with ended_in_the_end(*workers):
            for worker in workers:
                worker.start_ready()
            assert command_line("grant", "acme", "30", "--reason", "x", "--wait")[0] == 0
            assert command_line("grant", "beta", "5", "--budget", "--reason", "x", "--wait")[0] == 0
            with Meter.connect() as meter:
                for number in range(20):
                    try:
                        with meter.task(
                            client_id="acme", sku="gpu", credits=2, correlation_id=f"t{number}"
                        ) as task:
                            task.charge(sku="gpu", credits="1.75")
                    except CreditsExhausted:
                        break
                    meter.flush(60)  # settled: what was reserved and not used is available again
            assert number == 17, "17 tasks of 1.75 leave less than 2"

            def is_right():
                code, out, err = command_line("check", "--wait-s", "60", "--json")
                report = json.loads(out)
                assert (code, report["differences"], report["lost"]) == (0, [], []), err
                assert report["buckets"] == 2
                balance = json.loads(command_line("balance", "acme", "--json")[1])
                assert (balance["consumed"], balance["available"], balance["provisional"]) == (
                    "29.75",
                    "0.25",
                    "0",
                )
                return report["generation"]

            first = is_right()
            assert command_line("rebuild", "--reason", "drill", "--timeout-s", "120")[0] == 0
            second = is_right()
            redis = Redis.from_url(own.settings.redis.url)
            redis.flushall()
            redis.close()
            assert first < second < is_right()

        ledger = connect(own.settings.clickhouse)
        given = ledger.execute("SELECT client_id, kind, credits_micro FROM credit_grants ORDER BY 1, 2")
        changes = ledger.execute("SELECT action, reason FROM quota_changes")
        ledger.disconnect()
    assert given == [
        ("acme", "prepaid", 30 * MICRO),
        ("beta", "baseline", 5 * MICRO),
        ("beta", "budget", 5 * MICRO),
    ]
    assert changes == [("rebuild", "drill")]
