"""Independent accounts of the pipeline: what was published against ledger, state, windows and Stripe.

Plain SQL over raw rows, Kafka as any committed reader sees it, Stripe as its own summaries tell. No sum is
taken from the code under test.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import BytesIO
from typing import Any

import fastavro
import stripe
from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Consumer, Message, TopicPartition
from tests.stacks import RunningStack

from meterline.clients import ClientRegistry
from meterline.contracts.files import schemas_dir
from meterline.contracts.partitioner import partition_for
from meterline.domain.clients import Client
from meterline.producer import UsageProducer
from meterline.settings import SANDBOX_API_KEY

__all__ = [
    "WINDOW_MS",
    "WORKER_SETTINGS",
    "Traffic",
    "client_books",
    "committed",
    "log_ends",
    "metering_metas",
    "settle",
]

MICRO = 1_000_000
WINDOW_MS = 1_000
WORKER_SETTINGS = {
    "METERLINE_METERING__WINDOW_LENGTH_MS": str(WINDOW_MS),
    "METERLINE_METERING__ALLOWED_LATENESS_MS": "500",
    "METERLINE_METERING__IDLE_AFTER_MS": "500",
    "METERLINE_METERING__FLUSH_INTERVAL_MS": "200",
    "METERLINE_METERING__LATE_SNAPSHOT_INTERVAL_MS": "500",
    # Shorter than LATE_BY: some late events meet a window that only the ledger remembers.
    "METERLINE_METERING__KEEP_CLOSED_WINDOWS_MS": "5000",
    "METERLINE_BILLING__REQUESTS_PER_SECOND": "100",
    "METERLINE_WORKER__SESSION_TIMEOUT_MS": "6000",
}
LATE_BY = (timedelta(seconds=3), timedelta(seconds=12))
RESENT_SHARE = LATE_SHARE = 0.03
SOURCE_PARTITIONS = 4
SLICE, SLICE_PAUSE_S = 12, 0.1
"""Each flush finds some, in every partition. More would only keep the machine from what is tested."""
KAFKA_S_MAX = 30.0
STUCK_AFTER_S = 60.0
"""Nothing has changed for so long: it won't any more. However busy the machine is, something does before."""
SETTLE_PAUSE_S = 0.3
SINGLE_OBJECT_HEADER = 10
"""Avro's single-object encoding: two magic bytes and a fingerprint of eight."""


class Traffic:
    """What clients do, in slices; three events in a hundred are sent again, three others come late.

    Attributes:
        credits_micro: by client and event id, of every event that Kafka acknowledged.
        records: how many records that took.
        dead_letters: how many records more were written that are no events.
        resent_share: how many of the events are sent again. 0 while a client's partition changes: a copy in
            another one is a twin, which is found by an audit and not here.
    """

    def __init__(
        self, stack: RunningStack, clients: int = 8, client_config: Mapping[str, Any] | None = None
    ) -> None:
        self.credits_micro: dict[str, dict[str, int]] = defaultdict(dict)
        self.records = 0
        self.dead_letters = 0
        self.customers: dict[str, str] = {}
        self.resent_share = RESENT_SHARE
        self._stack = stack
        self._chance = random.Random(7)
        self._number = itertools.count()
        self._sent: list[dict] = []
        self._producer = UsageProducer(stack.settings, client_config=client_config)
        for number in range(clients):
            self.add_client(_client_of(number))

    def add_client(self, client_id: str) -> None:
        """One more, with a customer at Stripe."""
        customer = stripe_client(self._stack).v1.customers.create({"name": client_id}).id
        now_ms = time.time_ns() // MICRO
        ClientRegistry(self._stack.settings).put(
            Client(client_id, stripe_customer_id=customer, updated_at=now_ms, updated_by="test")
        )
        self.customers[client_id] = customer

    @contextmanager
    def by_another_producer(self, **client_config: Any) -> Iterator[None]:
        """Until the end of the block another program publishes, which sends nothing again but its own."""
        before = self._producer, self._sent
        self._producer, self._sent = UsageProducer(self._stack.settings, client_config=client_config), []
        try:
            yield
        finally:
            self._producer.close()
            self._producer, self._sent = before

    def publish(self, events: int = SLICE) -> None:
        """One slice, acknowledged."""
        sent = []
        for _ in range(events):
            event = self._event()
            sent.append((event, self._producer.publish(**event)))
            self._sent.append(event)
            if self._chance.random() < self.resent_share:
                again = self._chance.choice(self._sent)
                sent.append((again, self._producer.publish(**again)))
        self._producer.flush()
        self.records += len(sent)
        for event, event_id in sent:
            self.credits_micro[event["client_id"]][event_id] = int(Decimal(event["credits"]) * MICRO)

    def _event(self) -> dict:
        now = datetime.now(UTC)
        late = self._chance.choice(LATE_BY) if self._chance.random() < LATE_SHARE else timedelta()
        return {
            "client_id": self._chance.choice(list(self.customers)),
            "correlation_id": f"task-{next(self._number)}",
            "sku": self._chance.choice(("gpu", "tokens")),
            "credits": str(Decimal(self._chance.randrange(1, 2_000_000)) / MICRO),
            "occurred_at": now - late,
        }

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """A slice every tenth of a second, in the background, until the end of the block."""
        stop = threading.Event()
        failed: list[Exception] = []

        def publish() -> None:
            try:
                while not stop.wait(SLICE_PAUSE_S):
                    self.publish()
            except Exception as error:  # noqa: BLE001 - raised again at the end of the block
                failed.append(error)

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert failed == []

    def close(self) -> None:
        """Nothing is left to be sent."""
        self._producer.close()


def _client_of(number: int) -> str:
    """A name nobody else has, such that one client after the other has the next partition: none is empty."""
    while True:
        name = f"client-{number}-{uuid.uuid4().hex[:8]}"
        if partition_for(name.encode(), SOURCE_PARTITIONS) == number % SOURCE_PARTITIONS:
            return name


def settle(stack: RunningStack, traffic: Traffic, *, is_billed: bool = True) -> list[str]:
    """Wait until the books are exact, or nothing changes any more; what then differs: nothing.

    Args:
        is_billed: a billing worker runs, too.
    """
    before: list[str] = []
    changed_at = time.monotonic()
    while True:
        began = time.monotonic()
        wrong = differences(stack, traffic, is_billed=is_billed)
        if wrong != before:
            before, changed_at = wrong, time.monotonic()
        if not wrong or time.monotonic() - changed_at > STUCK_AFTER_S:
            return wrong
        # A look reads everything: half of the time is for those who are looked at.
        time.sleep(max(SETTLE_PAUSE_S, time.monotonic() - began))


def differences(stack: RunningStack, traffic: Traffic, *, is_billed: bool = True) -> list[str]:
    """Everything in which the pipeline differs from what was published, as of now."""
    settings = stack.settings.clickhouse
    with ClickHouse(settings.host, settings.port, settings.database) as ledger:
        return [
            *_wrong_rows(ledger, traffic),
            *_wrong_counters(stack, ledger, traffic),
            *_wrong_windows(stack, ledger),
            *_wrong_totals(stack, ledger),
            *(_wrong_billing(stack, ledger, traffic) if is_billed else ()),
        ]


ONE_OF_EACH_OFFSET = """
    SELECT topic_id, `partition`, `offset`, any(client_id) AS client_id, any(event_id) AS event_id,
           any(credits_micro) AS credits_micro, any(occurred_at) AS occurred_at
    FROM events GROUP BY topic_id, `partition`, `offset`
"""
"""A crash between insert and commit leaves copies of rows, until a merge: the same rows, which is checked."""


def _wrong_rows(ledger: ClickHouse, traffic: Traffic) -> Iterator[str]:
    """Every published event stands at exactly one offset, every offset holds one event."""
    for row in ledger.execute(
        "SELECT `partition`, `offset` FROM events GROUP BY topic_id, `partition`, `offset` "
        "HAVING uniqExact(event_id, client_id, sku, credits_micro, occurred_at, appended_at) > 1"
    ):
        yield f"offset {row} holds different events"
    for row in ledger.execute(
        "SELECT client_id, event_id, groupUniqArray((`partition`, `offset`)) FROM events "
        "GROUP BY client_id, event_id HAVING uniqExact((topic_id, `partition`, `offset`)) > 1"
    ):
        yield f"event counted twice: {row}"
    rows = ledger.execute(f"SELECT client_id, event_id, credits_micro FROM ({ONE_OF_EACH_OFFSET})")
    found = {(client, event_id, micro) for client, event_id, micro in rows}
    wanted = {
        (c, event_id, m) for c, events in traffic.credits_micro.items() for event_id, m in events.items()
    }
    if found != wanted:
        yield f"ledger: {len(wanted - found)} events missing, {len(found - wanted)} that nobody published"


def _wrong_counters(stack: RunningStack, ledger: ClickHouse, traffic: Traffic) -> Iterator[str]:
    """What became of every offset of every partition adds up, and agrees with rows and dead letters."""
    ends = log_ends(stack, "usage.events")
    rows = dict(
        ledger.execute(f"SELECT `partition`, count() FROM ({ONE_OF_EACH_OFFSET}) GROUP BY `partition`")
    )
    dead: dict[int, int] = defaultdict(int)
    for message in committed(stack, "usage.events.dlq"):
        dead[message.partition()] += 1
    metas = metering_metas(stack)
    if metas.keys() != ends.keys():
        yield f"partitions with a meta record: {sorted(metas)}"
        return
    for partition, meta in metas.items():
        counters = meta["counters"]
        if meta["applied_offset"] != ends[partition] - 1:
            yield f"partition {partition}: applied to {meta['applied_offset']}, its end is {ends[partition]}"
        told = [counters[name] for name in ("accepted", "duplicates", "dead_letters", "skipped")]
        if sum(told) != meta["applied_offset"] + 1 - counters["first_offset"]:
            yield f"partition {partition}: counters {counters} don't add up to {meta['applied_offset']}"
        if [told[0], told[2]] != [rows.get(partition, 0), dead[partition]]:
            yield f"partition {partition}: counters {counters}, {rows} rows, {dict(dead)} dead letters"
    unique = sum(map(len, traffic.credits_micro.values()))
    if sum(ends.values()) != traffic.records + traffic.dead_letters:
        yield f"the log holds {sum(ends.values())} records, {traffic.records} were acknowledged"
    if sum(dead.values()) != traffic.dead_letters:
        yield f"{sum(dead.values())} dead letters, {traffic.dead_letters} records were no events"
    if (
        duplicates := sum(meta["counters"]["duplicates"] for meta in metas.values())
    ) != traffic.records - unique:
        yield f"{duplicates} duplicates counted, {traffic.records - unique} sent"


def _wrong_windows(stack: RunningStack, ledger: ClickHouse) -> Iterator[str]:
    """For every client, window and partition: sum of the rows = snapshot with the highest cutoff."""
    schema = fastavro.parse_schema(json.loads((schemas_dir() / "usage-window" / "v1.avsc").read_text()))
    amounts: dict[tuple[str, int], tuple[int, int]] = {}
    latest: dict[tuple[str, int, int], tuple[int, int, int]] = {}
    for message in committed(stack, "usage.windows"):
        said = fastavro.schemaless_reader(BytesIO(message.value()[SINGLE_OBJECT_HEADER:]), schema, None)
        cutoff, skus = said["cutoff_offset"], said["skus"]
        amount = (sum(s["count"] for s in skus), sum(s["credits_micro"] for s in skus))
        if amounts.setdefault((said["window_id"], cutoff), amount) != amount:
            yield f"window {said['window_id']} says two things as of {cutoff}"
        window = (said["client_id"], said["source_partition"], _ms(said["window_start"]))
        latest[window] = max(latest.get(window, (-1, 0, 0)), (cutoff, *amount))
    rows = ledger.execute(
        "SELECT client_id, `partition`, "
        f"intDiv(toUnixTimestamp64Milli(occurred_at), {WINDOW_MS}) * {WINDOW_MS} AS start, "
        f"count(), sum(credits_micro) FROM ({ONE_OF_EACH_OFFSET}) GROUP BY client_id, `partition`, start"
    )
    summed = {(client, partition, start): (count, micro) for client, partition, start, count, micro in rows}
    told = {window: (count, micro) for window, (_, count, micro) in latest.items()}
    if summed != told:
        different = [w for w in summed.keys() | told.keys() if summed.get(w) != told.get(w)]
        first = min(different)
        yield f"{len(different)} windows differ, {first}: rows {summed.get(first)}, told {told.get(first)}"


def _wrong_totals(stack: RunningStack, ledger: ClickHouse) -> Iterator[str]:
    """For every client and partition: sum of the rows = total with the highest cutoff, and behind a progress
    no total is missing.
    """
    total, progress = (
        fastavro.parse_schema(json.loads((schemas_dir() / name / "v1.avsc").read_text()))
        for name in ("usage-total", "usage-progress")
    )
    amounts: dict[tuple[int, str, int], tuple[int, int]] = {}
    latest: dict[tuple[int, str], tuple[int, int, int]] = {}
    published: dict[int, int] = {}
    for message in committed(stack, "usage.totals"):
        is_total = message.key().startswith(b"17:meterline.total.1,")
        schema = total if is_total else progress
        said = fastavro.schemaless_reader(BytesIO(message.value()[SINGLE_OBJECT_HEADER:]), schema, None)
        partition = said["source_partition"]
        if not is_total:
            published[partition] = max(published.get(partition, -1), said["published_until"])
            continue
        client, cutoff = said["client_id"], said["cutoff_offset"]
        amount = (said["count"], said["credits_micro"])
        if amounts.setdefault((partition, client, cutoff), amount) != amount:
            yield f"the total of {client} in {partition} says two things as of {cutoff}"
        if cutoff <= published.get(partition, -1) and latest.get((partition, client), (-1,))[0] < cutoff:
            yield f"a total of {client} as of {cutoff} came behind progress {published[partition]}"
        latest[partition, client] = max(latest.get((partition, client), (-1, 0, 0)), (cutoff, *amount))
    rows = ledger.execute(
        "SELECT `partition`, client_id, count(), sum(credits_micro) "
        f"FROM ({ONE_OF_EACH_OFFSET}) GROUP BY `partition`, client_id"
    )
    summed = {(partition, client): (count, micro) for partition, client, count, micro in rows}
    told = {key: (count, micro) for key, (_, count, micro) in latest.items()}
    if summed != told:
        different = [key for key in summed.keys() | told.keys() if summed.get(key) != told.get(key)]
        first = min(different)
        yield f"{len(different)} totals differ, {first}: rows {summed.get(first)}, told {told.get(first)}"
    ends = {partition: end - 1 for partition, end in log_ends(stack, "usage.events").items()}
    if published != ends:
        yield f"totals are published up to {published}, the log ends at {ends}"


def client_books(stack: RunningStack, clients: Container[str]) -> list[dict[str, tuple[int, int]]]:
    """Events and credits of some clients: by the ledger's rows, the latest snapshots and the latest totals,
    whatever topic and partition they came from.
    """
    settings = stack.settings.clickhouse
    with ClickHouse(settings.host, settings.port, settings.database) as ledger:
        rows = ledger.execute(
            f"SELECT client_id, count(), sum(credits_micro) FROM ({ONE_OF_EACH_OFFSET}) GROUP BY client_id"
        )
    books = [{client: (count, micro) for client, count, micro in rows if client in clients}]
    for topic, name in (("usage.windows", "usage-window"), ("usage.totals", "usage-total")):
        schema = fastavro.parse_schema(json.loads((schemas_dir() / name / "v1.avsc").read_text()))
        latest: dict[object, tuple[int, str, int, int]] = {}
        for message in committed(stack, topic):
            if message.key().startswith(b"20:meterline.progress.1,"):
                continue
            said = fastavro.schemaless_reader(BytesIO(message.value()[SINGLE_OBJECT_HEADER:]), schema, None)
            parts = said.get("skus", [said])
            amount = (sum(part["count"] for part in parts), sum(part["credits_micro"] for part in parts))
            about = said.get("window_id", message.key())
            found = (said["cutoff_offset"], said["client_id"], *amount)
            latest[about] = max(latest.get(about, found), found)
        sums: dict[str, tuple[int, int]] = {}
        for _, client, count, micro in latest.values():
            before = sums.get(client, (0, 0))
            sums[client] = (before[0] + count, before[1] + micro)
        books.append({client: amount for client, amount in sums.items() if client in clients})
    return books


def _wrong_billing(stack: RunningStack, ledger: ClickHouse, traffic: Traffic) -> Iterator[str]:
    """Stripe counts the whole credits of each client, made of identifiers that each count once."""
    log = ledger.execute(
        "SELECT client_id, identifier, value, state, kind FROM usage_record_log WHERE identifier != '' "
        "ORDER BY log_id, `partition`, seq, generation DESC LIMIT 1 BY log_id, `partition`, seq"
    )
    states: dict[str, str] = {}
    made: set[str] = set()
    values: dict[tuple[str, str], int] = {}
    for client, identifier, value, state, kind in log:
        if values.setdefault((client, identifier), value) != value:
            yield f"{identifier} has two values"
        if kind == "record":
            if identifier in made:
                yield f"{identifier} was made twice"
            made.add(identifier)
        states[identifier] = state
    open_ = [identifier for identifier, state in states.items() if state not in {"accepted", "duplicate"}]
    if open_:
        yield f"{len(open_)} usage records without a final answer: {[states[one] for one in open_[:5]]}"
    for client, customer in traffic.customers.items():
        units = _stripe_units(stack, customer)
        whole = sum(traffic.credits_micro[client].values()) // MICRO
        sent = sum(value for (name, _), value in values.items() if name == client)
        if not units == whole == sent:
            yield f"{client}: Stripe counts {units}, identifiers add up to {sent}, published {whole} credits"


def _stripe_units(stack: RunningStack, customer: str) -> int:
    client = stripe_client(stack)
    meters = client.v1.billing.meters.list({"limit": 100}).data
    meter = next((meter.id for meter in meters if meter.event_name == "meterline_credits"), None)
    if meter is None:
        return 0
    start = int(time.time()) // 86_400 * 86_400 - 86_400
    window = {"customer": customer, "start_time": start, "end_time": start + 3 * 86_400, "limit": 100}
    summaries = client.v1.billing.meters.event_summaries.list(meter, window).data
    return int(sum(Decimal(str(summary.aggregated_value)) for summary in summaries))


def stripe_client(stack: RunningStack) -> stripe.StripeClient:
    """Stripe's own library, at the sandbox."""
    return stripe.StripeClient(SANDBOX_API_KEY, base_addresses={"api": stack.settings.stripe.sandbox_url})


def metering_metas(stack: RunningStack) -> dict[int, dict]:
    """The newest committed meta record of each partition: the one JSON value in the changelog."""
    return {
        message.partition(): json.loads(message.value())
        for message in committed(stack, "metering-state-changelog")
        if message.key()[2:] == b"M"
    }


def log_ends(stack: RunningStack, topic: str) -> dict[int, int]:
    """The offset that the next record of each partition will get."""
    with _reader(stack) as consumer:
        return {
            p: consumer.get_watermark_offsets(TopicPartition(topic, p), KAFKA_S_MAX)[1]
            for p in consumer.list_topics(topic, KAFKA_S_MAX).topics[topic].partitions
        }


def committed(stack: RunningStack, topic: str) -> list[Message]:
    """Every committed record of a topic up to its present end."""
    with _reader(stack) as consumer:
        unread = set(consumer.list_topics(topic, KAFKA_S_MAX).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, p, 0) for p in unread])
        found, deadline = [], time.monotonic() + KAFKA_S_MAX
        while unread:
            assert time.monotonic() < deadline, f"{topic} was not read to its end"
            for message in consumer.consume(10_000, 0.1):
                if message.error() is None:
                    found.append(message)
                else:
                    assert message.error().name() == "_PARTITION_EOF"
                    unread.discard(message.partition())
        return found


@contextmanager
def _reader(stack: RunningStack) -> Iterator[Consumer]:
    consumer = Consumer(
        stack.settings.kafka.client_config()
        | {
            "group.id": f"test-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 50,
        }
    )
    try:
        yield consumer
    finally:
        consumer.close()


def _ms(moment: datetime | int) -> int:
    """Milliseconds, of what the Avro library makes of a timestamp."""
    return moment if isinstance(moment, int) else round(moment.timestamp() * 1000)
