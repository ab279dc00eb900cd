"""The events of one run, and what they add up to by the generator's own reckoning."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

from confluent_kafka import Producer

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import event_to_record
from meterline.domain.events import UsageEvent

CLIENTS = 500
CLIENT_SKEW = 1.1
"""Zipf's exponent: the busiest client has about a sixth of the events, as with real clients."""
SKUS = 12
WINDOWS = 10
WINDOW_LENGTH_MS = 2_000
"""Length means nothing to the cost, their number does. Short ones keep `occurred_at` near the wall clock."""
SPAN_MS = WINDOWS * WINDOW_LENGTH_MS
PARTITIONS = 4
WARM_UP_EVENTS = 1_000
"""Before the clock: connections, caches and code paths are warm in both, and both are known to consume."""

CellKey = tuple[str, int, str]
"""Client, window start (ms), SKU."""


@dataclass(slots=True)
class Workload:
    """Encoded events in the order of their time.

    Attributes:
        messages: client, value, `occurred_at`, SKU.
        credits_micro, counts: what every (client, window, SKU) adds up to.
    """

    start_ms: int
    messages: list[tuple[bytes, bytes, int, bytes]] = field(default_factory=list)
    credits_micro: Counter[CellKey] = field(default_factory=Counter)
    counts: Counter[CellKey] = field(default_factory=Counter)

    @property
    def end_ms(self) -> int:
        """End of the windows that close within the run."""
        return self.start_ms + SPAN_MS

    def publish(self, producer: Producer, topic: str, part: slice, *, key_has_sku: bool = False) -> None:
        """Send a part of the events, each to its client's partition; returns when the broker has all."""
        partitions: dict[bytes, int] = {}
        for client, value, occurred_at, sku in self.messages[part]:
            if client not in partitions:
                partitions[client] = partition_for(client, PARTITIONS)
            key = client + b"|" + sku if key_has_sku else client
            while True:
                try:
                    producer.produce(topic, value, key, partitions[client], timestamp=occurred_at)
                    break
                except BufferError:
                    producer.poll(0.05)
        if left := producer.flush(60):
            raise TimeoutError(f"the broker did not acknowledge {left} events")


def make_workload(events: int, start_ms: int, seed: int) -> Workload:
    """Random clients (skewed), SKUs and credits; times rise evenly through the windows.

    The last events, one for each partition, stand in the window behind: they close all the others.
    """
    work = Workload(start_ms)
    codec = RecordCodec("usage-event")
    chance = random.Random(seed)
    weights = list(accumulate((rank + 1) ** -CLIENT_SKEW for rank in range(CLIENTS)))
    clients = chance.choices([f"client-{n:04d}" for n in range(CLIENTS)], cum_weights=weights, k=events)
    closers = _a_client_of_each_partition()
    clients[-len(closers) :] = closers
    ordinary = events - len(closers)
    for number, client in enumerate(clients):
        event = UsageEvent(
            event_id=f"{chance.getrandbits(128):032x}",
            client_id=client,
            correlation_id=str(uuid.UUID(int=chance.getrandbits(128))),
            sku=f"sku-{chance.randrange(SKUS):02d}",
            credits_micro=chance.randrange(1, 5_000_000),
            occurred_at=work.end_ms if number >= ordinary else start_ms + number * SPAN_MS // ordinary,
            source="bench",
        )
        cell = client, event.occurred_at // WINDOW_LENGTH_MS * WINDOW_LENGTH_MS, event.sku
        work.credits_micro[cell] += event.credits_micro
        work.counts[cell] += 1
        work.messages.append(
            (client.encode(), codec.encode(event_to_record(event)), event.occurred_at, event.sku.encode())
        )
    return work


def _a_client_of_each_partition() -> list[str]:
    found: dict[int, str] = {}
    for number in range(1_000):
        client = f"closer-{number}"
        found.setdefault(partition_for(client.encode(), PARTITIONS), client)
    return [found[partition] for partition in range(PARTITIONS)]
