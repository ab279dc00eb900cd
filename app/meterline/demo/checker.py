"""Is every credit accounted for? Asked of input files, Kafka, raw ledger rows, Stripe's own summaries, Redis.

A checker of money shares no code with what it checks: nothing here is imported from the pipeline (an import
rule holds it to that), and every sum is formed anew.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
import redis
import stripe
from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Consumer, TopicPartition

__all__ = ["Accounts", "Checker", "ClientAccount", "Expected", "Places", "read_input"]

MICRO = 1_000_000
SOURCE, DEAD_LETTERS, ALERTS = "usage.events", "usage.events.dlq", "credit.alerts"
METER_EVENT_NAME = "meterline_credits"
UNIT_MICRO = MICRO
"""The packaged meters file: one unit is one credit."""
SINGLE_OBJECT_HEADER = 10
"""Avro's single-object encoding: two magic bytes and a fingerprint of eight."""
DONE = {"accepted", "duplicate", "settled"}
KAFKA_TIMEOUT_S = 10.0
DAY_S = 86_400
AMOUNTS = ("granted", "life", "base", "prov", "held")
EXHAUSTED_PERCENT = 100


@dataclass(frozen=True, slots=True)
class Places:
    """Where to ask."""

    kafka: str
    clickhouse_host: str
    clickhouse_port: int
    database: str
    stripe_url: str
    stripe_key: str
    redis_url: str
    redis_namespace: str
    schemas: Path


@dataclass(frozen=True, slots=True)
class Expected:
    """What the input files say, however it was delivered."""

    records: int
    """Lines of the files but the grants: each is one Kafka record."""
    events: dict[str, int]
    """Different tasks' charges by client: what must be counted."""
    credits_micro: dict[str, int]
    dead: Counter[str]
    """Dead letters by reason."""
    granted_micro: dict[str, int]
    exhausted: frozenset[str]
    """Clients that were refused work: each must have been alerted once, and nobody else."""


@dataclass(slots=True)
class ClientAccount:
    """One client through the whole pipeline; credits in millionths."""

    events: int = 0
    file_micro: int = 0
    ledger_micro: int = 0
    windows: int = 0
    windows_micro: int = 0
    held_micro: int = 0
    held_reasons: set[str] = field(default_factory=set)
    in_flight: int = 0
    stripe_units: int = 0
    grants_micro: int = 0
    """By the input."""
    granted_micro: int = 0
    """By the credit bucket; as the next two."""
    consumed_micro: int = 0
    undecided_micro: int = 0
    """Reserved, or settled and not yet charged by the log."""
    alerts: int = 0
    """That the credits are exhausted."""

    @property
    def available_micro(self) -> int:
        """Credits the client has left."""
        return self.granted_micro - self.consumed_micro - self.undecided_micro

    @property
    def remainder_micro(self) -> int:
        """Credits below a whole unit, which Stripe isn't told yet."""
        return self.ledger_micro - self.held_micro - self.stripe_units * UNIT_MICRO


@dataclass(frozen=True, slots=True)
class Accounts:
    """What was found, and what is wrong with it; no problems: conserved."""

    clients: Mapping[str, ClientAccount]
    records: int
    dead: Counter[str]
    problems: Sequence[str]

    @property
    def summary(self) -> str:
        """The last line of the demo."""
        accounts = self.clients.values()
        events = sum(account.events for account in accounts)
        facts = {
            "events": events,
            "duplicates": self.records - events - self.dead.total(),
            "dead": self.dead.total(),
            "credits": _credits(sum(account.ledger_micro for account in accounts)),
            "stripe_units": sum(account.stripe_units for account in accounts),
            "remainder": _credits(sum(account.remainder_micro for account in accounts)),
            "held": _credits(sum(account.held_micro for account in accounts)),
        }
        listed = " ".join(f"{name}={value}" for name, value in facts.items())
        return f"conserved: {'no' if self.problems else 'yes'} ({listed})"


def read_input(
    usage_files: Sequence[Path], poison_file: Path, grants_file: Path, exhausted: Iterable[str] = ()
) -> Expected:
    """Count the input: a charge is (client, task, SKU), and the first one in the files counts."""
    records, charges = 0, dict[tuple[str, str, str], int]()
    for usage_file in usage_files:
        with usage_file.open(newline="") as text:
            for row in csv.DictReader(text):
                records += 1
                charge = (row["client_id"], row["correlation_id"], row["sku"])
                charges.setdefault(charge, int(Decimal(row["credits"]) * MICRO))
    with grants_file.open(newline="") as text:
        granted = {row["client_id"]: int(row["credits"]) * MICRO for row in csv.DictReader(text)}
    dead = Counter(json.loads(line)["reason"] for line in poison_file.read_text().splitlines())
    events, credits_micro = Counter[str](), Counter[str]()
    for (client, _, _), micro in charges.items():
        events[client] += 1
        credits_micro[client] += micro
    return Expected(
        records + dead.total(), dict(events), dict(credits_micro), dead, granted, frozenset(exhausted)
    )


class Checker:
    """Checks one run: its clients, and what was appended to the log since it began."""

    def __init__(self, places: Places, customers: Mapping[str, str | None], began: datetime) -> None:
        self._places = places
        self._customers = customers
        self._began = began
        self._start = {topic: self._end_offsets(topic) for topic in (SOURCE, DEAD_LETTERS, ALERTS)}

    def check(self, expected: Expected) -> Accounts:
        """Look at everything once."""
        end = self._end_offsets(SOURCE)
        records = sum(end.values()) - sum(self._start[SOURCE].values())
        accounts = {client: ClientAccount() for client in self._customers}
        for client, micro in expected.credits_micro.items():
            accounts[client].file_micro = micro
        for client, micro in expected.granted_micro.items():
            accounts[client].grants_micro = micro
        problems: list[str] = []
        with ClickHouse(
            self._places.clickhouse_host, self._places.clickhouse_port, self._places.database
        ) as ledger:
            problems += self._read_events(ledger, accounts, end)
            self._read_windows(ledger, accounts)
            self._read_usage_records(ledger, accounts)
        self._read_stripe(accounts)
        self._read_buckets(accounts)
        for alert in self._read_topic(ALERTS, "credit-alert"):
            if (account := accounts.get(alert["client_id"])) is not None:  # else an earlier run's
                account.alerts += alert["level_percent"] == EXHAUSTED_PERCENT
        dead = Counter(letter["reason"] for letter in self._read_topic(DEAD_LETTERS, "dead-letter"))
        problems += self._compare(expected, accounts, records, dead)
        return Accounts(accounts, records, dead, problems)

    # -- what there is

    def _end_offsets(self, topic: str) -> dict[int, int]:
        with _CommittedReader(self._places.kafka) as consumer:
            partitions = consumer.list_topics(topic, timeout=KAFKA_TIMEOUT_S).topics[topic].partitions
            return {
                p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=KAFKA_TIMEOUT_S)[1]
                for p in partitions
            }

    def _read_events(
        self, ledger: ClickHouse, accounts: Mapping[str, ClientAccount], end: Mapping[int, int]
    ) -> list[str]:
        """Raw rows of the log's range, each offset once, however often it was inserted."""
        start = self._start[SOURCE]
        ranges = " OR ".join(f"(`partition` = {p} AND `offset` >= {start[p]})" for p in end)
        rows = ledger.execute(
            f"""
            SELECT client_id, count(), uniqExact(event_id), sum(toInt128(credits_micro))
            FROM (
                SELECT client_id, event_id, credits_micro FROM events
                WHERE ({ranges}) AND appended_at >= %(began)s
                LIMIT 1 BY topic_id, `partition`, `offset`
            )
            GROUP BY client_id
            """,  # noqa: S608 - numbers of ours
            {"began": self._began},
        )
        problems = []
        for client, events, different, micro in rows:
            if client not in accounts:
                problems.append(f"the ledger has {events} events of {client}, who isn't in the input")
                continue
            accounts[client].events, accounts[client].ledger_micro = events, int(micro)
            if events != different:
                problems.append(f"{client}: {events - different} events were counted twice")
        return problems

    def _read_windows(self, ledger: ClickHouse, accounts: Mapping[str, ClientAccount]) -> None:
        rows = ledger.execute(
            """
            SELECT client_id, count(), sum(micro) FROM (
                SELECT client_id, window_id,
                       argMax(arraySum(credits_micro) + arraySum(free_credits_micro), cutoff_offset) AS micro
                FROM window_snapshots WHERE client_id IN %(clients)s GROUP BY client_id, window_id
            ) GROUP BY client_id
            """,
            {"clients": list(accounts)},
        )
        for client, windows, micro in rows:
            accounts[client].windows, accounts[client].windows_micro = windows, micro

    def _read_usage_records(self, ledger: ClickHouse, accounts: Mapping[str, ClientAccount]) -> None:
        """Follow every step of billing in its order: what is held, what has no answer yet."""
        steps = ledger.execute(
            """
            SELECT client_id, kind, window_id, identifier, state, reason, credits_micro
            FROM usage_record_log WHERE client_id IN %(clients)s
            ORDER BY log_id, `partition`, seq LIMIT 1 BY log_id, `partition`, seq
            """,
            {"clients": list(accounts)},
        )
        held: dict[tuple[str, str], tuple[int, str]] = {}
        records: dict[tuple[str, str], str] = {}
        for client, kind, window, identifier, state, reason, micro in steps:
            if identifier:
                records[client, identifier] = state or records.get((client, identifier), "")
            elif kind == "held":
                held[client, window] = (micro, reason)
            elif kind == "released":
                held.pop((client, window), None)
        for (client, _), (micro, reason) in held.items():
            accounts[client].held_micro += micro
            accounts[client].held_reasons.add(reason)
        for (client, _), state in records.items():
            accounts[client].in_flight += state not in DONE

    def _read_stripe(self, accounts: Mapping[str, ClientAccount]) -> None:
        client = stripe.StripeClient(
            self._places.stripe_key, base_addresses={"api": self._places.stripe_url}, max_network_retries=2
        )
        meters = client.v1.billing.meters.list({"limit": 100}).auto_paging_iter()
        meter = next((meter.id for meter in meters if meter.event_name == METER_EVENT_NAME), None)
        if meter is None:
            return
        first = int(self._began.timestamp()) // DAY_S * DAY_S - DAY_S
        for name, customer in self._customers.items():
            if customer is None:
                continue
            summaries = client.v1.billing.meters.event_summaries.list(
                meter,
                {"customer": customer, "start_time": first, "end_time": first + 3 * DAY_S, "limit": 100},
            )
            accounts[name].stripe_units = int(
                sum(Decimal(str(summary.aggregated_value)) for summary in summaries.auto_paging_iter())
            )

    def _read_buckets(self, accounts: Mapping[str, ClientAccount]) -> None:
        """The amounts as they stand in Redis, wherever the client's key is."""
        with redis.Redis.from_url(self._places.redis_url, decode_responses=True) as server:
            for key in server.scan_iter(f"{self._places.redis_namespace}:{{*}}:b:*", count=1_000):
                account = accounts.get(key.split(":b:", 1)[1])
                if account is None:
                    continue  # an earlier run's
                bucket = server.hgetall(key)
                amount = {field: int(bucket.get(field, 0)) for field in AMOUNTS}
                account.granted_micro = amount["granted"]
                account.consumed_micro = amount["life"] - amount["base"]
                account.undecided_micro = amount["prov"] + amount["held"]

    def _read_topic(self, topic: str, schema_name: str) -> list[dict[str, Any]]:
        """What was committed since the run began, decoded with the published schema."""
        schema = fastavro.parse_schema(
            json.loads((self._places.schemas / schema_name / "v1.avsc").read_text())
        )
        records: list[dict[str, Any]] = []
        with _CommittedReader(self._places.kafka) as consumer:
            open_partitions = set(self._start[topic])
            consumer.assign([TopicPartition(topic, p, at) for p, at in self._start[topic].items()])
            while open_partitions:
                for message in consumer.consume(1_000, KAFKA_TIMEOUT_S):
                    if message.error() is None:
                        body = BytesIO((message.value() or b"")[SINGLE_OBJECT_HEADER:])
                        record: Any = fastavro.schemaless_reader(body, schema, None)
                        records.append(record)
                    else:  # the end of a partition
                        open_partitions.discard(message.partition())
        return records

    # -- what there should be

    def _compare(
        self, expected: Expected, accounts: Mapping[str, ClientAccount], records: int, dead: Counter[str]
    ) -> Iterable[str]:
        if records != expected.records:
            yield f"Kafka has {records} records of this run, the input has {expected.records}"
        if dead != expected.dead:
            yield f"dead letters are {dict(dead)}, expected {dict(expected.dead)}"
        for name, account in accounts.items():
            if account.events != (wanted := expected.events.get(name, 0)):
                yield f"{name}: {account.events} events in the ledger, {wanted} in the input"
            if account.ledger_micro != account.file_micro:
                yield _differ(name, "in the ledger", account.ledger_micro, "in the input", account.file_micro)
            if account.windows_micro != account.ledger_micro:
                yield _differ(
                    name, "in closed windows", account.windows_micro, "in the ledger", account.ledger_micro
                )
            if account.in_flight:
                yield f"{name}: {account.in_flight} usage records have no final answer of Stripe"
            yield from self._compare_billed(name, account)
            yield from self._compare_bucket(name, account, is_exhausted=name in expected.exhausted)

    def _compare_billed(self, name: str, account: ClientAccount) -> Iterable[str]:
        if self._customers[name] is None:
            if account.held_micro != account.ledger_micro or account.held_reasons - {"no_customer"}:
                yield (
                    f"{name}: {_credits(account.held_micro)} credits are held for "
                    f"{sorted(account.held_reasons)}, expected all {_credits(account.ledger_micro)}"
                )
            return
        # The demo's customers have no subscription. Billing reports it: no invoice will show their usage.
        if account.held_micro or account.held_reasons - {"no_subscription"}:
            yield f"{name}: {_credits(account.held_micro)} credits held for {sorted(account.held_reasons)}"
        # Each billing period keeps its own remainder; a run around midnight of the first touches two.
        periods = len({(self._began.year, self._began.month), _month_before_hours(self._began, 2)})
        if not 0 <= account.remainder_micro < periods * UNIT_MICRO:
            credits_ = _credits(account.ledger_micro)
            yield f"{name}: Stripe counts {account.stripe_units} units for {credits_} credits"
        if not account.stripe_units:
            yield f"{name}: Stripe counts no unit"

    @staticmethod
    def _compare_bucket(name: str, account: ClientAccount, *, is_exhausted: bool) -> Iterable[str]:
        """The log has charged all there is in the ledger, nothing is left undecided, nobody has debts."""
        if account.granted_micro != account.grants_micro:
            yield _differ(name, "in its bucket", account.granted_micro, "granted", account.grants_micro)
        if account.consumed_micro != account.ledger_micro:
            yield _differ(name, "charged", account.consumed_micro, "in the ledger", account.ledger_micro)
        if account.undecided_micro:
            yield f"{name}: {_credits(account.undecided_micro)} credits are reserved or not yet charged"
        if account.available_micro < 0:
            yield f"{name}: {_credits(-account.available_micro)} credits more were used than granted"
        if account.alerts != is_exhausted:
            yield f"{name}: alerted {account.alerts} times, expected {int(is_exhausted)}"


class _CommittedReader:
    """A committed reader that belongs to no group."""

    def __init__(self, bootstrap: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "meterline-demo-checker",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "log_level": 0,
            }
        )

    def __enter__(self) -> Consumer:
        return self._consumer

    def __exit__(self, *_: object) -> None:
        self._consumer.close()


def _month_before_hours(moment: datetime, hours: int) -> tuple[int, int]:
    before = datetime.fromtimestamp(moment.timestamp() - hours * 3600, UTC)
    return before.year, before.month


def _differ(name: str, here: str, micro: int, there: str, other: int) -> str:
    return f"{name}: {_credits(micro)} credits {here}, {_credits(other)} {there}"


def _credits(micro: int) -> str:
    return f"{Decimal(micro) / MICRO:f}"
