"""One run of the demo, from nothing to the last line."""

from __future__ import annotations

import base64
import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path

import stripe
from confluent_kafka import Producer

from meterline.clients import ClientRegistry
from meterline.contracts.files import schemas_dir
from meterline.contracts.topic_admin import TopicAdmin
from meterline.contracts.topics import USAGE_EVENTS, load_topics
from meterline.demo.chaos import kills
from meterline.demo.checker import Accounts, Checker, Expected, Places, read_input
from meterline.demo.scenario import Scenario, write_scenario
from meterline.demo.screen import Screen
from meterline.demo.tasks import Worked, work_until_refused
from meterline.demo.traces import read_requests
from meterline.demo.workers import Worker, replayed_offsets, stop_all, wait_until
from meterline.domain.clients import Client
from meterline.domain.credits import to_micro
from meterline.domain.grants import CreditGrant, GrantKind
from meterline.errors import MeterlineError
from meterline.ledger.migrate import apply_migrations
from meterline.local.ports import Ports, free_ports, is_free
from meterline.local.service import Progress
from meterline.local.stack import Stack
from meterline.producer import UsageProducer
from meterline.quota.giving import publish_grant
from meterline.settings import SANDBOX_API_KEY, Settings, load_settings

__all__ = ["DEMO_SETTINGS", "Outcome", "choose_ports", "open_stack", "run"]

DEMO_SETTINGS = {
    "METERLINE_METERING__WINDOW_LENGTH_MS": "60000",
    "METERLINE_METERING__ALLOWED_LATENESS_MS": "3000",
    "METERLINE_METERING__IDLE_AFTER_MS": "1000",
    "METERLINE_METERING__LATE_SNAPSHOT_INTERVAL_MS": "2000",
    # The sandbox has no account-wide limit; Stripe's test mode would take four times as long.
    "METERLINE_BILLING__REQUESTS_PER_SECOND": "100",
    # After a restart of Redis, as between two runs, the buckets stay closed for the longest a hold may last.
    "METERLINE_QUOTA__RESERVATION_TTL_S": "5",
    "METERLINE_QUOTA__RESERVATION_TTL_MAX_S": "5",
    # A killed worker's partitions come back sooner.
    "METERLINE_WORKER__SESSION_TIMEOUT_MS": "6000",
}

METERING_WORKERS = 2
SETTLE_PAUSE_S = 1.0
PIECES, PIECE_PAUSE_S = 200, 0.15
"""Each piece meets another flush, and together they last as long as a worker may take to die at its step."""
STUCK_AFTER_S = 45.0
"""Nothing has changed for so long: it won't any more. The longest wait in a healthy run is one window."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run. `replayed` is None without chaos."""

    accounts: Accounts
    trial: str
    worked: Worked
    replayed: int | None


@contextmanager
def open_stack(
    state_dir: Path, show_progress: Callable[[], AbstractContextManager[Progress]], *, keep: bool
) -> Iterator[Stack]:
    """A local stack for the demo alone, and this process's settings pointed at it.

    Its windows are a minute long, so it shares no state with `meterline up`; where that has the usual ports,
    free ones are taken.
    """
    Stack(state_dir).down()
    stack = Stack(state_dir, choose_ports(Ports.from_environment()))
    for name in [name for name in os.environ if name.startswith("METERLINE_")]:
        del os.environ[name]  # a setting for the user's own cluster must not reach the demo
    spool = {"METERLINE_QUOTA__SPOOL_DIR": str(state_dir / "spool")}
    os.environ.update(stack.environment() | DEMO_SETTINGS | spool)
    try:
        with show_progress() as progress:
            stack.up(progress)
        yield stack
    finally:
        if not keep:
            stack.down()


def choose_ports(wanted: Ports) -> Ports:
    """The wanted ones, if nobody has one of them."""
    return wanted if all(map(is_free, astuple(wanted))) else Ports.free()


def run(
    stack: Stack, traces: Path | None, screen: Screen, *, chaos: bool, run_id: str | None = None
) -> Outcome:
    """Publish, meter, bill, check.

    Raises:
        UserError: the traces can't be read.
        WorkerFailed: a worker ended by itself.
    """
    settings = load_settings()
    now = datetime.now(UTC)
    run_id = run_id or now.strftime("%m%dT%H%M%S")
    folder = stack.state_dir / "runs" / run_id
    requests, source = read_requests(traces)
    scenario = write_scenario(requests, run_id, now, folder)
    screen.say(f"Run {run_id}: {len(requests)} {source}")
    screen.say(f"Two usage records each, resends, retries and poison, in {folder}")
    TopicAdmin(settings.kafka).apply(load_topics())
    apply_migrations(settings.clickhouse)
    customers = _register(settings, scenario)
    _grant(settings, scenario)
    checker = Checker(_places(settings), customers, scenario.started_at)
    workers = _workers(dict(os.environ), folder)
    try:
        for worker in workers.values():
            worker.start()
        for worker in workers.values():
            wait_until(worker, "ready")
        screen.say(f"Workers are ready: {', '.join(workers)}")
        tasks_file = folder / "tasks.csv"
        if chaos:
            _publish_under_fire(scenario, workers, screen)
        else:
            _publish(scenario.usage_file)
        _publish_poison(settings, scenario.poison_file)
        worked = work_until_refused(settings, scenario.trial, run_id, tasks_file)
        expected = read_input(
            [scenario.usage_file, tasks_file], scenario.poison_file, scenario.grants_file, [scenario.trial]
        )
        with screen.progress(sum(expected.events.values())) as show:
            accounts = _settle(checker, expected, list(workers.values()), show)
    finally:
        stop_all(list(workers.values()))
    replayed = replayed_offsets(workers.values()) if chaos else None
    if replayed == 0:
        raise MeterlineError("no kill fell between insert and commit: nothing was replayed, nothing is shown")
    return Outcome(accounts, scenario.trial, worked, replayed)


def _register(settings: Settings, scenario: Scenario) -> dict[str, str | None]:
    """A Stripe customer for every client but one, and all of them in the registry."""
    sandbox = stripe.StripeClient(SANDBOX_API_KEY, base_addresses={"api": settings.stripe.sandbox_url})
    registry = ClientRegistry(settings)
    customers: dict[str, str | None] = {}
    for client_id in scenario.clients:
        customer = None
        if client_id != scenario.without_customer:
            customer = sandbox.v1.customers.create({"name": client_id}).id
        now_ms = time.time_ns() // 1_000_000
        registry.put(
            Client(client_id, stripe_customer_id=customer, updated_at=now_ms, updated_by="meterline demo")
        )
        customers[client_id] = customer
    return customers


def _grant(settings: Settings, scenario: Scenario) -> None:
    """Credits for everybody, before anybody works."""
    with scenario.grants_file.open(newline="") as text:
        for row in csv.DictReader(text):
            publish_grant(
                settings.kafka,
                CreditGrant(
                    grant_id=f"demo-{row['client_id']}",
                    client_id=row["client_id"],
                    kind=GrantKind.PREPAID,
                    credits_micro=to_micro(row["credits"]),
                    granted_at=time.time_ns() // 1_000_000,
                    granted_by="meterline demo",
                    reason="the demo's clients may work",
                ),
            )


def _places(settings: Settings) -> Places:
    return Places(
        kafka=settings.kafka.bootstrap_servers,
        clickhouse_host=settings.clickhouse.host,
        clickhouse_port=settings.clickhouse.port,
        database=settings.clickhouse.database,
        stripe_url=settings.stripe.sandbox_url,
        stripe_key=SANDBOX_API_KEY,
        redis_url=settings.redis.url,
        redis_namespace=settings.redis.namespace,
        schemas=schemas_dir(),
    )


def _workers(environment: Mapping[str, str], folder: Path) -> dict[str, Worker]:
    slots = [("metering", slot) for slot in range(1, METERING_WORKERS + 1)] + [
        ("billing", 1),
        ("quota", 1),
    ]
    ports = free_ports(len(slots))
    made = [
        Worker(kind, slot, port, environment, folder) for (kind, slot), port in zip(slots, ports, strict=True)
    ]
    return {worker.name: worker for worker in made}


# -- publishing


def _publish(file: Path) -> None:
    """Through the same command as everybody."""
    command = [sys.executable, "-m", "meterline", "publish", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        raise MeterlineError(f"publishing {file} failed: {done.stderr.strip() or done.stdout.strip()}")


def _publish_poison(settings: Settings, file: Path) -> None:
    """As a program without our library would: raw bytes."""
    producer = Producer(settings.kafka.client_config() | {"partitioner": "murmur2_random"})
    for line in file.read_text().splitlines():
        poison = json.loads(line)
        producer.produce(USAGE_EVENTS, base64.b64decode(poison["value"]), base64.b64decode(poison["key"]))
    producer.flush()


def _publish_under_fire(scenario: Scenario, workers: Mapping[str, Worker], screen: Screen) -> None:
    """As a worker would, task by task: a part of the input during each kill, and the rest after the last."""
    plan = kills()
    with scenario.usage_file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    size = -(-len(rows) // (len(plan) + 1))
    with UsageProducer() as producer, ThreadPoolExecutor(1) as background:
        for number, kill in enumerate(plan):
            kill.aim(workers)
            part = rows[number * size : (number + 1) * size]
            struck = threading.Event()
            publishing = background.submit(_publish_steadily, producer, part, struck)
            try:
                screen.say(kill.strike(workers))
            finally:
                struck.set()
            publishing.result()
        _publish_steadily(producer, rows[len(plan) * size :], struck)


def _publish_steadily(
    producer: UsageProducer, rows: Sequence[Mapping[str, str]], struck: threading.Event
) -> None:
    """In pieces until the kill has struck: a worker that dies at a step must come there several times."""
    size = -(-len(rows) // PIECES)
    for start in range(0, len(rows), size):
        for row in rows[start : start + size]:
            producer.publish(
                client_id=row["client_id"],
                correlation_id=row["correlation_id"],
                sku=row["sku"],
                credits=row["credits"],
                occurred_at=datetime.fromisoformat(row["occurred_at"]),
            )
        producer.flush()
        struck.wait(PIECE_PAUSE_S)


# -- the end


def _settle(checker: Checker, expected: Expected, workers: Sequence[Worker], show: Screen.Show) -> Accounts:
    """Look until everything is conserved, or nothing changes any more."""
    before, changed_at = "", time.monotonic()
    while True:
        accounts = checker.check(expected)
        show(accounts)
        if not accounts.problems:
            return accounts
        now = repr(accounts)
        if now != before:
            before, changed_at = now, time.monotonic()
        elif time.monotonic() - changed_at > STUCK_AFTER_S:
            return accounts
        for worker in workers:
            worker.require_running()
        time.sleep(SETTLE_PAUSE_S)
