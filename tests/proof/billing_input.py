"""What metering says in a quarter: hourly windows, late snapshots, corrections, repetitions; seeded.

The rows of the ledger that windows are verified against come a day at a time, before the day begins; of them
a window holds those up to its snapshot's cutoff, whenever it is looked at.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Producer
from tests.ledger_rows import event, insert_events
from tests.proof.billing_books import Statement, StatementFile

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import snapshot_to_record
from meterline.contracts.topics import USAGE_WINDOWS
from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot
from meterline.settings import Settings

__all__ = ["SOURCE_TOPIC_ID", "Publisher", "Quarter", "client_ids"]

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
SOURCE_TOPIC_ID = "proof-source"
PARTITIONS = 4
TWO_PARTITIONS_SHARE = 0.1
"""Of the windows: usage of one client came in two partitions, and their snapshots add up."""
LATE_SHARE, CORRECTED_SHARE, FREE_SHARE = 0.2, 0.15, 0.1
LATE_H_MAX, CORRECTED_H_MAX = 48, 72
"""So long after its window: some find their period's invoice final, and count in the next."""
AGAIN_SHARE = 0.1
"""Said again, or an older one said again: metering after a crash."""
MICRO_MAX = 9_000_000


def client_ids(count: int) -> list[str]:
    """One client after the other in the next partition of usage.windows: none is empty."""
    names = []
    for number in range(count):
        tries = (f"client-{number}-{extra}" for extra in range(1_000))
        names.append(
            next(name for name in tries if partition_for(name.encode(), PARTITIONS) == number % PARTITIONS)
        )
    return names


@dataclass(slots=True)
class Quarter:
    """All that will be said, by the hour in which it is, and the ledger's rows for it, by the day.

    Args:
        starts: every hour's start for which there may be windows.
        windows: of a client.

    Attributes:
        rows: by days since the epoch.
    """

    clients: Sequence[str]
    starts: Sequence[int]
    windows: int
    seed: int
    statements: dict[int, list[tuple[Statement, WindowSnapshot]]] = field(default_factory=dict)
    rows: dict[int, list[dict]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        changes = sorted(
            (
                change
                for number, client in enumerate(self.clients)
                for start in sorted(chance.sample(self.starts, self.windows))
                for change in _changes(chance, client, number, start)
            ),
            key=lambda change: change[:2],
        )
        offsets, totals = defaultdict[int, int](int), dict[WindowRef, SkuTotal]()
        for said_at, _, ref, micro, free in changes:
            offset = offsets[ref.partition]
            offsets[ref.partition] += 1 + bool(free)
            total = totals.setdefault(ref, SkuTotal()).copy()
            total.count, total.credits_micro = total.count + 1, total.credits_micro + micro
            self._add_row(said_at, offset, ref, micro, billable=True)
            if free:
                offset += 1
                total.free_count, total.free_credits_micro = (
                    total.free_count + 1,
                    total.free_credits_micro + free,
                )
                self._add_row(said_at, offset, ref, free, billable=False)
            totals[ref] = total
            snapshot = WindowSnapshot(ref, offset, {"gpu": total}, said_at, said_at)
            where = said_at, ref.client_id, ref.start, ref.partition
            said = Statement(*where, offset, total.credits_micro)
            self.statements.setdefault(said_at, []).append((said, snapshot))

    def _add_row(self, said_at: int, offset: int, ref: WindowRef, micro: int, *, billable: bool) -> None:
        self.rows[said_at // DAY_MS].append(
            event(
                offset,
                topic_id=ref.topic_id,
                partition=ref.partition,
                client_id=ref.client_id,
                occurred_at=ref.start + offset % HOUR_MS,
                appended_at=said_at,
                credits_micro=micro,
                billable=billable,
            )
        )


def _changes(
    chance: random.Random, client: str, number: int, start: int
) -> Iterator[tuple[int, float, WindowRef, int, int]]:
    """When a window changes, a lot, which one, by how much, and by how much that nobody is billed."""
    here = number % PARTITIONS
    partitions = [here, (here + 1) % PARTITIONS] if chance.random() < TWO_PARTITIONS_SHARE else [here]
    end = start + HOUR_MS
    for partition in partitions:
        ref = WindowRef(client, start, end, SOURCE_TOPIC_ID, partition)
        micro = chance.randint(1, MICRO_MAX)
        free = chance.randint(1, MICRO_MAX) if chance.random() < FREE_SHARE else 0
        yield end, chance.random(), ref, micro, free
        if chance.random() < LATE_SHARE:
            late = end + chance.randint(1, LATE_H_MAX) * HOUR_MS
            yield late, chance.random(), ref, chance.randint(0, MICRO_MAX), 0
        if chance.random() < CORRECTED_SHARE:
            corrected = end + chance.randint(1, CORRECTED_H_MAX) * HOUR_MS
            yield corrected, chance.random(), ref, -chance.randint(1, micro), 0


class Publisher:
    """Brings a quarter to the ledger and to usage.windows."""

    def __init__(self, settings: Settings, path: Path, seed: int) -> None:
        self.file = StatementFile(path)
        self._settings = settings
        self._chance = random.Random(seed)
        self._said: dict[str, list[WindowSnapshot]] = {}
        self._codec = RecordCodec("usage-window")
        self._failed: list[object] = []
        self._producer = Producer(
            {
                "bootstrap.servers": settings.kafka.bootstrap_servers,
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "linger.ms": 0,
            }
        )

    def insert_rows(self, rows: Sequence[dict]) -> None:
        """What the windows are verified against."""
        where = self._settings.clickhouse
        with ClickHouse(where.host, where.port, where.database) as ledger:
            insert_events(ledger, rows)

    def publish(self, said: Sequence[tuple[Statement, WindowSnapshot]]) -> None:
        """What one hour has to say; acknowledged when it returns."""
        self.file.add(statement for statement, _ in said)
        for _, snapshot in said:
            self._send(snapshot)
            of_window = self._said.setdefault(snapshot.ref.window_id, [])
            of_window.append(snapshot)
            if self._chance.random() < AGAIN_SHARE:
                self._send(self._chance.choice(of_window))
        left = self._producer.flush(60)
        if left or self._failed:
            raise RuntimeError(f"{left} snapshots are not acknowledged, refused: {self._failed[:3]}")

    @property
    def said_up_to(self) -> tuple[int, int]:
        """How many windows there were, and the sum of their newest cutoffs, which only grow."""
        return len(self._said), sum(said[-1].cutoff_offset for said in self._said.values())

    def _send(self, snapshot: WindowSnapshot) -> None:
        self._producer.produce(
            USAGE_WINDOWS,
            self._codec.encode(snapshot_to_record(snapshot)),
            snapshot.ref.client_id.encode(),
            on_delivery=lambda error, _: error and self._failed.append(error),
        )
