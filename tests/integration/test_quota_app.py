"""The quota worker on real Kafka, Redis and ClickHouse: totals and grants in, balances out."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Producer
from redis import Redis
from redis.exceptions import RedisError
from tests.pipeline_books import committed
from tests.stacks import own_stack
from tests.worker_processes import ALL, WorkerProcess, ended_in_the_end, until

from meterline.clients import ClientRegistry
from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import (
    progress_key,
    progress_to_record,
    total_key,
    total_to_record,
)
from meterline.domain.buckets import parse_balance
from meterline.domain.clients import Client, PeriodUnit
from meterline.domain.grants import CreditGrant, GrantKind
from meterline.domain.totals import UsageProgress, UsageTotal
from meterline.domain.windows import SkuTotal
from meterline.quota.giving import publish_grant
from meterline.quota.shards import open_shards
from meterline.quota.webhook import signature
from meterline.streaming.log_ranges import read_log_ranges

pytestmark = [pytest.mark.stack, pytest.mark.timeout(250)]

TTL_MAX_S = 3
SKEW_MS = 100
SETTINGS = {
    "METERLINE_QUOTA__RESERVATION_TTL_MAX_S": str(TTL_MAX_S),
    "METERLINE_QUOTA__CLOCK_SKEW_MS": str(SKEW_MS),
    "METERLINE_WORKER__SESSION_TIMEOUT_MS": "6000",
}
MICRO = 1_000_000
DAY_MS = 86_400_000


stack = own_stack("local")
"""Its Redis is killed and emptied. Local: containers' processes are nobody's to kill."""


@pytest.fixture(scope="module")
def environment(stack):
    return stack.process_environment() | SETTINGS


class Log:
    """Writes usage.totals as metering does: changed totals, then progress, in each partition, each second."""

    def __init__(self, stack):
        self.topic_id = read_log_ranges(stack.settings.kafka, "usage.events", [0])[0].topic_id
        self._producer = Producer(stack.settings.kafka.client_config())
        self._totals = RecordCodec("usage-total")
        self._progress = RecordCodec("usage-progress")
        self._cutoffs = dict.fromkeys(ALL, 100)
        self._said_at = 0.0

    def say(self, used=None, partition=0, accounted_until=None):
        """Totals (client -> lifetime credits) of one partition, then the progress of all."""
        for client_id, life in (used or {}).items():
            self._cutoffs[partition] += 1
            sums = SkuTotal(1, int(life * MICRO), 0, 0)
            total = UsageTotal(self.topic_id, partition, client_id, self._cutoffs[partition], sums)
            value = self._totals.encode(total_to_record(total))
            self._produce(partition, total_key(self.topic_id, partition, client_id), value)
        until_ms = now_ms() - 1 if accounted_until is None else accounted_until
        for number in ALL:
            progress = UsageProgress(self.topic_id, number, until_ms, self._cutoffs[number])
            value = self._progress.encode(progress_to_record(progress))
            self._produce(number, progress_key(self.topic_id, number), value)
        assert self._producer.flush(30) == 0
        self._said_at = time.monotonic()

    def go_on(self):
        """Progress, at most once a second: more often, and a reader never sees the end twice."""
        if time.monotonic() - self._said_at >= 1:
            self.say()

    def _produce(self, partition, key, value):
        self._producer.produce("usage.totals", value, key, partition)


@pytest.fixture(scope="module")
def log(stack):
    return Log(stack)


@pytest.fixture
def worker(environment, tmp_path):
    worker = WorkerProcess("quota", environment, tmp_path)
    with ended_in_the_end(worker):
        worker.start_ready()
        yield worker
        assert worker.process.poll() in {None, -signal.SIGKILL}, worker.log_tail()


def now_ms():
    return time.time_ns() // 1_000_000


def ops(stack, client_id, *operations):
    """Operations of a client's bucket, as the library would send them."""

    async def run():
        shards = await open_shards(stack.settings.redis)
        try:
            return (await shards.run([(client_id, operations)]))[0]
        finally:
            await shards.close()

    return asyncio.run(run())


def balance(stack, client_id):
    return parse_balance(ops(stack, client_id, ["b"])[0])


def give(stack, client_id, amount, kind=GrantKind.PREPAID, **fields):
    """A grant on the log, with an id of its own."""
    publish_grant(
        stack.settings.kafka,
        CreditGrant(
            grant_id=fields.pop("grant_id", uuid.uuid4().hex),
            client_id=client_id,
            kind=kind,
            credits_micro=int(amount * MICRO),
            granted_at=now_ms(),
            granted_by="test",
            reason="a test",
            **fields,
        ),
    )


def decoded(stack, topic, codec, client_id):
    """The client's records of a topic."""
    records = (codec.decode(message.value()) for message in committed(stack, topic))
    return [record for record in records if record["client_id"] == client_id]


def amounts(stack, client_id):
    found = balance(stack, client_id)
    return (found.granted / MICRO, found.consumed / MICRO, found.open)


@pytest.mark.usefixtures("worker")
def test_totals_and_grants_become_a_balance(stack, log, unique):
    """Prepaid credits less what the log charged, over all partitions; a copy of a grant counts once."""
    client_id, grant_id = unique("client"), unique("grant")
    give(stack, client_id, 100, grant_id=grant_id)
    give(stack, client_id, 100, grant_id=grant_id)
    log.say({client_id: 7.5}, partition=1)
    log.say({client_id: 10}, partition=2)
    log.say({client_id: 8}, partition=1)

    until(lambda: saying(log, lambda: amounts(stack, client_id) == (100, 18, True)), "18 used")


@pytest.mark.usefixtures("worker")
def test_a_hold_ends_when_the_log_is_accounted_past_its_deadline_and_not_before(stack, log, unique):
    """Its own clock ran out at once; the sweep waits for every partition of the log, and the skew."""
    client_id, rid = unique("client"), unique("task")
    give(stack, client_id, 10)
    granted = until_granted(stack, log, client_id, ["r", rid, 4 * MICRO, 100])
    deadline = int(granted.split()[1])

    log.say(accounted_until=deadline + SKEW_MS - 1)
    time.sleep(2.5)
    before = balance(stack, client_id).reserved
    log.say(accounted_until=deadline + SKEW_MS)

    assert before == 4 * MICRO
    until(lambda: balance(stack, client_id).reserved == 0, "the hold has expired")
    assert ops(stack, client_id, ["r", rid, 4 * MICRO, 100]) == ["t"]


def until_granted(stack, log, client_id, reserve):
    """The answer to a reserve that the buckets grant in the end: they may be closed or not know the grant."""
    answers = []

    def granted():
        log.go_on()
        answers.extend(ops(stack, client_id, reserve))
        return answers[-1].startswith("g ")

    until(granted, "a reservation is granted")
    return answers[-1]


@pytest.mark.parametrize("how", ["flushed", "killed"])
@pytest.mark.usefixtures("worker")
def test_a_lost_redis_is_closed_rebuilt_and_opened_behind_the_last_deadline(stack, log, unique, how):
    """No bucket is believed after it; totals and grants come back by themselves; holds are waited out."""
    client_id = unique("client")
    give(stack, client_id, 50)
    log.say({client_id: 20}, partition=3)
    until_granted(stack, log, client_id, ["r", unique("task"), MICRO, 1000])
    before = balance(stack, client_id)
    lost_at = now_ms()

    lose(stack, how)
    log.say()
    closed = ops(stack, client_id, ["r", unique("task"), MICRO, 1000])
    until(lambda: rebuilt(stack, client_id, before.generation), "all is told again")
    log.say(accounted_until=lost_at + TTL_MAX_S * 1000)  # the loss was noticed after it: not enough
    time.sleep(2.5)
    early = balance(stack, client_id)
    until_granted(stack, log, client_id, ["r", unique("task"), MICRO, 1000])

    assert closed == ["c"]
    assert (early.open, early.granted, early.consumed) == (False, 50 * MICRO, 20 * MICRO)
    after = balance(stack, client_id)
    assert (after.granted, after.consumed, after.open) == (50 * MICRO, 20 * MICRO, True)
    assert after.generation > before.generation


def lose(stack, how):
    """Everything is gone, or perhaps the last second of it."""
    with Redis.from_url(stack.settings.redis.url) as redis:
        if how == "flushed":
            redis.flushall()
        else:
            os.kill(redis.info("server")["process_id"], signal.SIGKILL)
            until(lambda: not is_up(redis), "Redis is dead")
            stack.local.up()


def is_up(redis):
    with suppress(RedisError):
        return redis.ping()
    return False


def rebuilt(stack, client_id, old_generation):
    """Whether the new generation's bucket knows what the old one's did."""
    found = balance(stack, client_id)
    return found.generation > old_generation and (found.granted, found.consumed) == (50 * MICRO, 20 * MICRO)


def test_what_one_worker_was_told_the_next_one_knows(stack, log, worker, environment, tmp_path, unique):  # noqa: PLR0917 - fixtures
    """The first is killed while the second waits: the buckets stay open under the same generation."""
    client_id = unique("client")
    give(stack, client_id, 30)
    until_granted(stack, log, client_id, ["r", unique("task"), MICRO, 1000])
    generation = balance(stack, client_id).generation
    second = WorkerProcess("quota", environment, tmp_path)
    with ended_in_the_end(second):
        second.start()
        until(second.partitions, "the second worker has partitions")
        worker.kill()
        until(lambda: second.partitions() == ALL and second.is_ready(), "it has all of them")
        log.say({client_id: 12}, partition=0)

        until(lambda: balance(stack, client_id).consumed == 12 * MICRO, "its total is applied")
        found = balance(stack, client_id)

        assert (True, generation) == (found.open, found.generation)


def test_each_level_is_told_once_and_the_webhook_hears_it(stack, log, environment, tmp_path, unique):
    """80 % and exhaustion, each one alert however many totals follow; again only after more was granted."""
    client_id = unique("client")
    ClientRegistry(stack.settings).put(Client(client_id, alert_levels_percent=(50, 80), updated_by="test"))
    give(stack, client_id, 10)
    with Receiver() as receiver:
        worker = WorkerProcess(
            "quota",
            environment,
            tmp_path,
            METERLINE_QUOTA__WEBHOOK_URL=f"http://127.0.0.1:{receiver.port}/credits?for=test",
            METERLINE_QUOTA__WEBHOOK_SECRET="a secret",
            METERLINE_QUOTA__WEBHOOK_ALLOW_PRIVATE="true",
        )
        with ended_in_the_end(worker):
            worker.start_ready()
            for used in (8, 8.5, 10, 12):
                log.say({client_id: used}, partition=2)
                time.sleep(1.5)
            until(lambda: levels(stack, client_id) == [50, 80, 100], "three alerts")
            give(stack, client_id, 10)
            log.say({client_id: 19}, partition=2)
            until(lambda: len(levels(stack, client_id)) == 5, "two more, of the new amount")
            until(lambda: len(receiver.posts_of(client_id)) == 5, "the webhook heard all")

    assert levels(stack, client_id) == [50, 80, 100, 50, 80]
    for headers, body in receiver.posts_of(client_id):
        stamp = headers["Meterline-Signature"].split(",")[0].removeprefix("t=")
        assert headers["Meterline-Signature"] == signature(b"a secret", int(stamp), body)


def levels(stack, client_id):
    return [
        a["level_percent"] for a in decoded(stack, "credit.alerts", RecordCodec("credit-alert"), client_id)
    ]


class Receiver:
    """A webhook's receiver: refuses the first post."""

    def __init__(self):
        self.posts = []
        refused = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805 - beside our own self
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                if refused:
                    self.posts.append((dict(handler.headers), body))
                handler.send_response(204 if refused else 503)
                handler.end_headers()
                refused.append(1)

            def log_message(handler, *_):  # noqa: N805 - as above
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def posts_of(self, client_id):
        return [post for post in self.posts if json.loads(post[1])["client_id"] == client_id]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.usefixtures("worker")
def test_a_budget_opens_anew_when_the_logs_clock_passes_the_periods_start(stack, log, unique):
    """What was used before is the base; the baseline is on the log once, and in the ledger."""
    client_id = unique("client")
    boundary = now_ms() + 120_000  # further than a busy machine needs for the first period
    registry = ClientRegistry(stack.settings)
    registry.put(Client(client_id, period_unit=PeriodUnit.DAY, period_anchor=boundary, updated_by="test"))
    log.say({client_id: 3}, partition=1)
    until_granted(stack, log, client_id + "-other", ["r", unique("task"), 0, 1000])
    give(stack, client_id, 40, GrantKind.BUDGET, period_start=boundary - DAY_MS)

    until(lambda: saying(log, lambda: amounts(stack, client_id) == (40, 0, True)), "the first period")
    log.say({client_id: 8}, partition=1)
    until(lambda: amounts(stack, client_id) == (40, 5, True), "5 of it are used")
    log.say({client_id: 9}, partition=2, accounted_until=boundary - 1)
    until(lambda: amounts(stack, client_id) == (40, 14, True), "14 of it")
    time.sleep(1.5)
    assert [boundary - DAY_MS] == [b["period_start"] for b in baselines(stack, client_id)]
    log.say(accounted_until=boundary)
    until(lambda: balance(stack, client_id).period_start == boundary, "the second period")

    assert amounts(stack, client_id) == (40, 0, True)
    first, second = baselines(stack, client_id)
    assert [part["credits_micro"] for part in first["base"]] == [3 * MICRO]
    assert [part["credits_micro"] for part in second["base"]] == [8 * MICRO, 9 * MICRO]
    until(lambda: ledger_kinds(stack, client_id) == ["budget", "baseline", "baseline"], "ledger rows")


def saying(log, is_so):
    """Ask while the log goes on."""
    log.go_on()
    return is_so()


def baselines(stack, client_id):
    grants = decoded(stack, "credit.grants", RecordCodec("credit-grant"), client_id)
    return [grant for grant in grants if grant["kind"] == "baseline"]


def ledger_kinds(stack, client_id):
    where = stack.settings.clickhouse
    with ClickHouse(where.host, where.port, where.database) as ledger:
        rows = ledger.execute(
            "SELECT kind FROM credit_grants "
            "WHERE client_id = %(c)s AND outcome = 'applied' ORDER BY `offset`",
            {"c": client_id},
        )
    return [kind for (kind,) in rows]
