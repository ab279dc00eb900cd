"""Reads what the checker judges: Kafka as any committed reader sees it, raw ledger rows, raw Redis keys.

Nothing of the product is imported: keys, framing and statements are read by their published description.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import fastavro
from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Consumer, Message, TopicPartition
from redis import Redis
from redis.exceptions import RedisError
from tests.proof.quota_books import BucketNow, Event, Evidence, Sample, TaskBook
from tests.proof.task_log import now_ms, read_lines

__all__ = ["Observer", "Places", "committed", "decoder", "gather", "read_bucket"]

KAFKA_S_MAX = 60.0
SINGLE_OBJECT_HEADER = 10
"""Avro's single-object encoding: two magic bytes and a fingerprint of eight."""
SHARDS = 64
SAMPLE_S = 0.02
LEASES_EACH = 5
"""Every n-th sample reads the reservations, too: they are many."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look."""

    kafka: str
    clickhouse_host: str
    clickhouse_port: int
    database: str
    redis_url: str
    namespace: str
    schemas: Path


def gather(
    places: Places, client_id: str, task_logs: Iterable[Path], observer: Observer | None = None
) -> Evidence:
    """Everything about one client, as of now."""
    lines = [line for path in task_logs for line in read_lines(path)]
    with Redis.from_url(places.redis_url, decode_responses=True) as redis:
        bucket = read_bucket(redis, places.namespace, client_id)
    return Evidence(
        tasks=TaskBook(lines),
        log=_log(places, client_id),
        granted=_granted(places, client_id),
        totals=_totals(places, client_id),
        ledger=_ledger(places, client_id),
        dead=dict(_dead(places, client_id)),
        bucket=bucket,
        samples=[] if observer is None else list(observer.samples),
        lease_holds={} if observer is None else dict(observer.lease_holds),
    )


# -- Redis


def tag_of(namespace: str, client_id: str) -> str:
    """What the keys of a client's shard begin with."""
    return f"{namespace}:{{{zlib.crc32(client_id.encode()) % SHARDS:02}}}:"


def read_bucket(redis: Redis, namespace: str, client_id: str) -> BucketNow:
    """The sums, and their parts. Of an older generation: nothing is there."""
    tag = tag_of(namespace, client_id)
    generation, fields = redis.hget(tag + "state", "gen"), redis.hgetall(f"{tag}b:{client_id}")
    if not fields or fields.get("gen") != generation:
        return BucketNow(0, 0, 0, 0)
    held: dict[str, int] = {}
    lapsed = []
    for rid, text in redis.hgetall(f"{tag}r:{client_id}").items():
        state, hold, _, _, seq, _ = text.split(" ")
        if state == "held":
            held[rid] = int(hold)
        elif state == "expired" and int(seq):
            lapsed.append(rid)
    entries = [
        (f"{key} {member}", int(member.rpartition(":")[2]))
        for key in redis.scan_iter(match=f"{_literal(tag)}p:*", count=1_000)
        if key.endswith(f":{client_id}")
        for member in redis.zrange(key, 0, -1)
    ]
    return BucketNow(
        granted=int(fields.get("granted", 0)),
        consumed=int(fields.get("life", 0)) - int(fields.get("base", 0)),
        provisional=int(fields.get("prov", 0)),
        reserved=int(fields.get("held", 0)),
        provisional_entries=entries,
        held=held,
        lapsed_leases=lapsed,
    )


class Observer:
    """Looks at a bucket many times a second, from the side, and remembers what it saw while it was open."""

    def __init__(self, places: Places, client_id: str) -> None:
        self._places, self._client = places, client_id
        self._tag = tag_of(places.namespace, client_id)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.samples: list[Sample] = []
        self.lease_holds: dict[str, int] = {}
        self.held = 0
        """Reservations that were open at the last look."""
        self.generations: set[str] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with Redis.from_url(self._places.redis_url, decode_responses=True, socket_timeout=2) as redis:
            number = 0
            while not self._stop.wait(SAMPLE_S):
                number += 1
                with suppress(RedisError):  # killed, by intention: the next look finds it again
                    self._look(redis, with_reservations=number % LEASES_EACH == 0)

    def _look(self, redis: Redis, *, with_reservations: bool) -> None:
        pipe = redis.pipeline(transaction=True)
        pipe.hmget(self._tag + "state", "gen", "open", "run")
        pipe.hmget(f"{self._tag}b:{self._client}", "gen", "granted", "base", "life", "prov", "held")
        pipe.info("server")
        if with_reservations:
            pipe.hgetall(f"{self._tag}r:{self._client}")
        (generation, is_open, run), fields, server, *reservations = pipe.execute()
        for records in reservations:
            self.held = 0
            for rid, text in records.items():
                state, hold, _, _, seq, _ = text.split(" ")
                self.held += state == "held"
                if int(seq):
                    self.lease_holds[rid] = max(self.lease_holds.get(rid, 0), int(hold))
        if is_open == "1" and run == server["run_id"] and fields[0] == generation:
            self.generations.add(generation)
            granted, base, life, prov, held = (int(value or 0) for value in fields[1:])
            unused = granted - (life - base) - prov
            self.samples.append(Sample(now_ms(), unused - held, unused))


def _literal(text: str) -> str:
    return "".join(f"\\{sign}" if sign in "*?[]\\^" else sign for sign in text)


# -- Kafka


def committed(kafka: str, topic: str) -> list[Message]:
    """Every committed record of a topic up to its present end."""
    with _reader(kafka) as consumer:
        unread = set(consumer.list_topics(topic, KAFKA_S_MAX).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, p, 0) for p in unread])
        found, deadline = [], time.monotonic() + KAFKA_S_MAX
        while unread:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{topic} was not read to its end")
            for message in consumer.consume(10_000, 0.1):
                if message.error() is None:
                    found.append(message)
                elif message.error().name() == "_PARTITION_EOF":
                    unread.discard(message.partition())
                else:
                    raise RuntimeError(f"{topic}: {message.error()}")
        return found


def _log(places: Places, client_id: str) -> list[Event]:
    read = decoder(places, "usage-event")
    events = []
    for message in committed(places.kafka, "usage.events"):
        if message.key() == client_id.encode():
            said = read(message.value())
            what = said["event_id"], said["sku"], said["credits_micro"], said["reservation_id"]
            events.append(Event(message.partition(), message.offset(), message.timestamp()[1], *what))
    return sorted(events)


def _granted(places: Places, client_id: str) -> list[tuple[int, int]]:
    read = decoder(places, "credit-grant")
    by_id: dict[str, tuple[int, int]] = {}
    for message in committed(places.kafka, "credit.grants"):
        said = read(message.value())
        if said["client_id"] == client_id and said["kind"] == "prepaid":
            by_id.setdefault(said["grant_id"], (message.timestamp()[1], said["credits_micro"]))
    return sorted(by_id.values())


def _totals(places: Places, client_id: str) -> int:
    """Totals and progress share the topic; the key tells them apart by its first word."""
    read = decoder(places, "usage-total")
    newest: dict[tuple[str, int], tuple[int, int]] = defaultdict(lambda: (-1, 0))
    for message in committed(places.kafka, "usage.totals"):
        if b"meterline.total.1" not in message.key():
            continue
        said = read(message.value())
        if said["client_id"] == client_id:
            source = said["topic_id"], said["source_partition"]
            newest[source] = max(newest[source], (said["cutoff_offset"], said["credits_micro"]))
    return sum(micro for _, micro in newest.values())


def _dead(places: Places, client_id: str) -> Iterator[tuple[tuple[int, int], str]]:
    read = decoder(places, "dead-letter")
    for message in committed(places.kafka, "usage.events.dlq"):
        said = read(message.value())
        if said["key"] == client_id.encode():
            yield (said["partition"], said["offset"]), said["reason"]


def decoder(places: Places, name: str) -> Any:
    schema = fastavro.parse_schema(json.loads((places.schemas / name / "v1.avsc").read_text()))
    return lambda value: fastavro.schemaless_reader(BytesIO(value[SINGLE_OBJECT_HEADER:]), schema, None)


@contextmanager
def _reader(kafka: str) -> Iterator[Consumer]:
    consumer = Consumer(
        {
            "bootstrap.servers": kafka,
            "group.id": f"proof-{uuid.uuid4()}",
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


# -- the ledger


def _ledger(places: Places, client_id: str) -> dict[tuple[int, int], tuple[str, int]]:
    """Raw rows, one of each offset: a crash between insert and commit leaves copies until a merge."""
    with ClickHouse(places.clickhouse_host, places.clickhouse_port, places.database) as ledger:
        rows = ledger.execute(
            "SELECT `partition`, `offset`, event_id, credits_micro FROM events WHERE client_id = %(client)s "
            "LIMIT 1 BY topic_id, `partition`, `offset`",
            {"client": client_id},
        )
    return {(partition, offset): (event_id, micro) for partition, offset, event_id, micro in rows}
