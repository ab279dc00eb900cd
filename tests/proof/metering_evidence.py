"""Reads what the checker of metering judges: the source log's length, raw rows, committed statements.

Nothing of the product is imported: keys, framing and statements are read by their published description.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Consumer, TopicPartition
from tests.proof.metering_books import Amount, Evidence, Row, Snapshot, Total, lines_of
from tests.proof.quota_evidence import Places, committed, decoder

__all__ = ["gather", "is_accounted", "log_ends"]

KAFKA_S_MAX = 30.0
TOTAL_KEY = b"meterline.total.1"
"""Totals and progress share a topic; their keys tell them apart by the first word."""


def gather(places: Places, input_file: Path, window_ms: int) -> Evidence:
    """Everything, as of now."""
    read_letter = decoder(places, "dead-letter")
    return Evidence(
        lines=lines_of(input_file),
        rows=_rows(places),
        snapshots=list(_snapshots(places)),
        totals=list(_totals(places)),
        dead=[
            read_letter(message.value())["reason"] for message in committed(places.kafka, "usage.events.dlq")
        ],
        records=sum(log_ends(places, "usage.events").values()),
        window_ms=window_ms,
    )


def _rows(places: Places) -> Iterator[Row]:
    """A crash between insert and commit leaves copies of rows until a merge: each different one once."""
    with ClickHouse(places.clickhouse_host, places.clickhouse_port, places.database) as ledger:
        found = ledger.execute_iter(
            "SELECT DISTINCT `partition`, `offset`, event_id, client_id, correlation_id, sku, credits_micro, "
            "billable, toUnixTimestamp64Milli(occurred_at) FROM events ORDER BY `partition`, `offset`",
            settings={"max_block_size": 50_000},
        )
        for row in found:
            yield Row(*row)


def _snapshots(places: Places) -> Iterator[Snapshot]:
    read = decoder(places, "usage-window")
    for message in committed(places.kafka, "usage.windows"):
        said = read(message.value())
        skus = {sku["sku"]: _amount(sku) for sku in said["skus"]}
        window = said["client_id"], _ms(said["window_start"]), said["source_partition"]
        yield Snapshot(*window, said["cutoff_offset"], skus)


def _totals(places: Places) -> Iterator[Total]:
    read = decoder(places, "usage-total")
    for message in committed(places.kafka, "usage.totals"):
        if TOTAL_KEY in message.key():
            said = read(message.value())
            yield Total(said["client_id"], said["source_partition"], said["cutoff_offset"], _amount(said))


def _amount(said: Any) -> Amount:
    return Amount(said["count"], said["credits_micro"], said["free_count"], said["free_credits_micro"])


def is_accounted(places: Places) -> bool:
    """Whether the pipeline says of every partition that all totals up to its end are published."""
    read, until = decoder(places, "usage-progress"), dict[int, int]()
    for message in committed(places.kafka, "usage.totals"):
        if TOTAL_KEY not in message.key():
            said = read(message.value())
            until[said["source_partition"]] = said["published_until"]
    return {p: end - 1 for p, end in log_ends(places, "usage.events").items()} == until


def log_ends(places: Places, topic: str) -> dict[int, int]:
    """The offset that the next record of each partition will get."""
    with closing(Consumer({"bootstrap.servers": places.kafka, "group.id": "proof-ends"})) as consumer:
        return {
            p: consumer.get_watermark_offsets(TopicPartition(topic, p), KAFKA_S_MAX)[1]
            for p in consumer.list_topics(topic, KAFKA_S_MAX).topics[topic].partitions
        }


def _ms(moment: datetime | int) -> int:
    return moment if isinstance(moment, int) else round(moment.timestamp() * 1000)
