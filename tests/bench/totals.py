"""Both sides' totals against the generator's own sums. Every difference is one line of text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping

from confluent_kafka import Consumer, Message, TopicPartition
from tests.bench.workload import PARTITIONS, WINDOW_LENGTH_MS, CellKey, Workload

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import snapshot_from_record
from meterline.contracts.topics import USAGE_WINDOWS
from meterline.domain.windows import WindowSnapshot
from meterline.ledger.client import connect
from meterline.settings import ClickHouseSettings

SILENCE_S_MAX = 30.0

LEDGER_SUMS = """
SELECT client_id, intDiv(toUnixTimestamp64Milli(occurred_at), %(length)s) * %(length)s AS window_start, sku,
       sum(credits_micro), count()
FROM events FINAL
WHERE occurred_at >= fromUnixTimestamp64Milli(%(since)s)
  AND occurred_at < fromUnixTimestamp64Milli(%(before)s)
GROUP BY client_id, window_start, sku
"""


def wrong_in_ledger(work: Workload, settings: ClickHouseSettings) -> list[str]:
    """Rows of the ledger, credits and counts, closing events included."""
    client = connect(settings)
    try:
        times = {"since": work.start_ms, "before": work.end_ms + WINDOW_LENGTH_MS}
        rows = client.execute(LEDGER_SUMS, {"length": WINDOW_LENGTH_MS, **times})
    finally:
        client.disconnect()
    amounts = {(row[0], row[1], row[2]): row[3] for row in rows}
    counts = {(row[0], row[1], row[2]): row[4] for row in rows}
    return [
        *_differences("ledger, credits", work.credits_micro, amounts),
        *_differences("ledger, count", work.counts, counts),
    ]


def wrong_in_snapshots(work: Workload, bootstrap: str) -> list[str]:
    """The newest snapshot of every window that is closed."""
    codec = RecordCodec("usage-window")
    newest: dict[tuple[str, int, int], WindowSnapshot] = {}
    for message in _all_records(bootstrap, USAGE_WINDOWS):
        snapshot = snapshot_from_record(codec.decode(message.value()))
        key = snapshot.ref.client_id, snapshot.ref.start, snapshot.ref.partition
        if key not in newest or newest[key].cutoff_offset < snapshot.cutoff_offset:
            newest[key] = snapshot
    amounts: Counter[CellKey] = Counter()
    counts: Counter[CellKey] = Counter()
    for (client, start, _), snapshot in newest.items():
        if work.start_ms <= start < work.end_ms:
            for sku, total in snapshot.skus.items():
                amounts[client, start, sku] += total.credits_micro
                counts[client, start, sku] += total.count
    return [
        *_differences("snapshots, credits", _closed(work, work.credits_micro), amounts),
        *_differences("snapshots, count", _closed(work, work.counts), counts),
    ]


def wrong_in_stock(work: Workload, bootstrap: str, changelog: str) -> list[str]:
    """The last value of every key in the changelog of the stock table."""
    amounts: dict[CellKey, int] = {}
    for message in _all_records(bootstrap, changelog):
        key, (start, _) = json.loads(message.key())
        client, sku = key.split("|")
        amounts[client, round(start * 1000), sku] = json.loads(message.value())
    return _differences("stock table, credits", work.credits_micro, amounts)


def wrong_in_sums(work: Workload, bootstrap: str, topic: str, what: str) -> list[str]:
    """Final sums as Kafka Streams and Quix Streams write them; one that comes twice is wrong."""
    amounts: Counter[CellKey] = Counter()
    for message in _all_records(bootstrap, topic):
        *start, client, sku = message.key().decode().split("|")
        if start:
            cell, amount = (client, int(start[0]), sku), int.from_bytes(message.value(), "big", signed=True)
        else:
            window = json.loads(message.value())
            cell, amount = (client, window["start"], sku), window["value"]
        amounts[cell] += amount
    return _differences(f"{what}, credits", _closed(work, work.credits_micro), amounts)


def _closed(work: Workload, sums: Mapping[CellKey, int]) -> dict[CellKey, int]:
    return {cell: value for cell, value in sums.items() if cell[1] < work.end_ms}


def _differences(what: str, expected: Mapping[CellKey, int], actual: Mapping[CellKey, int]) -> list[str]:
    cells = sorted(expected.keys() | actual.keys())
    wrong = [cell for cell in cells if expected.get(cell, 0) != actual.get(cell, 0)]
    if not wrong:
        return []
    first = wrong[0]
    off = sum(actual.values()) - sum(expected.values())
    text = f"{what}: {len(wrong)} of {len(cells)} sums are wrong, {off:+} in total; the first is {first}, "
    return [f"{text}{actual.get(first)} instead of {expected.get(first)}"]


def _all_records(bootstrap: str, topic: str) -> Iterator[Message]:
    """Every committed record of a topic, from the first to the ends as of now."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "bench-totals",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
        }
    )
    try:
        consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
        ended: set[int] = set()
        while len(ended) < PARTITIONS:
            message = consumer.poll(SILENCE_S_MAX)
            if message is None:
                raise TimeoutError(f"{topic} can't be read to its end")
            if message.error() is None:
                yield message
            elif message.error().name() == "_PARTITION_EOF":
                ended.add(message.partition())
            else:
                raise RuntimeError(f"{topic}: {message.error()}")
    finally:
        consumer.close()
