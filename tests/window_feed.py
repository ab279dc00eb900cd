"""Closed windows as metering leaves them, without a metering worker: rows in the ledger, then snapshots.

For tests and measurements of billing alone. All is of one source partition, which has no topic.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import stripe
from clickhouse_driver import Client as ClickHouse
from confluent_kafka import Producer
from tests.ledger_rows import HOUR_MS, event, insert_events

from meterline.clients.records import client_to_record
from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import snapshot_to_record
from meterline.contracts.topics import CLIENTS, USAGE_WINDOWS
from meterline.domain.clients import Client
from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot
from meterline.settings import SANDBOX_API_KEY, Settings

__all__ = ["WindowFeed", "this_hour_ms"]

MICRO = 1_000_000
SOURCE, SOURCE_PARTITION = "window-feed", 0
SKU = "gpu"
FLUSH_S_MAX = 60.0
CALLS_AT_A_TIME = 8
"""To Stripe: the sandbox is one process."""


def this_hour_ms() -> int:
    """When the hour of this moment began."""
    return time.time_ns() // MICRO // HOUR_MS * HOUR_MS


class WindowFeed:
    """Says windows, and knows what is owed for them.

    Attributes:
        customers: at Stripe, by client.
        used_micro: of each client, by all windows that were said.
    """

    def __init__(self, settings: Settings) -> None:
        self.customers: dict[str, str] = {}
        self.used_micro: Counter[str] = Counter()
        self._sums: dict[WindowRef, SkuTotal] = {}
        self._offset = -1
        self._windows, self._clients = RecordCodec("usage-window"), RecordCodec("client")
        ledger = settings.clickhouse
        self._ledger = ClickHouse(ledger.host, ledger.port, ledger.database)
        self._stripe = stripe.StripeClient(
            SANDBOX_API_KEY, base_addresses={"api": settings.stripe.sandbox_url}
        )
        # As metering writes it: a client's records go where Java's partitioner puts them.
        self._producer = Producer(
            settings.kafka.client_config()
            | {
                "partitioner": "murmur2",
                "linger.ms": 20,
                "log_level": 0,
                "queue.buffering.max.messages": 1_000_000,
            }
        )

    def add_clients(self, names: Sequence[str], customers: Mapping[str, str] | None = None) -> None:
        """Register clients, each with a customer at Stripe: of its own, or one that is there."""

        def customer_of(name: str) -> str:
            return self._stripe.v1.customers.create({"name": name}).id

        if customers is None:
            with ThreadPoolExecutor(CALLS_AT_A_TIME) as threads:
                customers = dict(zip(names, threads.map(customer_of, names), strict=True))
        for name in names:
            self.customers[name] = customers[name]
            client = Client(name, customers[name], updated_at=time.time_ns() // MICRO, updated_by="test")
            self._producer.produce(CLIENTS, self._clients.encode(client_to_record(client)), name)
        self._flush()

    def say(self, usage: Iterable[tuple[str, int, int]]) -> None:
        """One more event in each of some hours: client, start of the hour, micro-credits."""
        self.publish(self.record(usage))

    def record(self, usage: Iterable[tuple[str, int, int]]) -> list[WindowSnapshot]:
        """The first half of `say`: the events are in the ledger, their windows not said yet."""
        rows, snapshots = [], []
        for client_id, start, micro in usage:
            self._offset += 1
            where = {"topic_id": SOURCE, "partition": SOURCE_PARTITION}
            what = {"client_id": client_id, "sku": SKU, "credits_micro": micro, "occurred_at": start + 1}
            rows.append(event(self._offset, **where, **what))
            ref = WindowRef(client_id, start, start + HOUR_MS, SOURCE, SOURCE_PARTITION)
            before = self._sums.get(ref, SkuTotal(0, 0))
            self._sums[ref] = total = SkuTotal(before.count + 1, before.credits_micro + micro)
            self.used_micro[client_id] += micro
            closed_at = start + HOUR_MS
            snapshots.append(WindowSnapshot(ref, self._offset, {SKU: total}, closed_at, closed_at))
        insert_events(self._ledger, rows)
        return snapshots

    def publish(self, snapshots: Iterable[WindowSnapshot]) -> None:
        """The second half."""
        for snapshot in snapshots:
            value = self._windows.encode(snapshot_to_record(snapshot))
            self._producer.produce(USAGE_WINDOWS, value, snapshot.ref.client_id)
        self._flush()

    def owed_units(self) -> dict[str, int]:
        """Whole credits of each client."""
        return {client: micro // MICRO for client, micro in self.used_micro.items()}

    def units_at_stripe(self) -> dict[str, int]:
        """What Stripe counts of each client, by its own summaries of yesterday, today and tomorrow."""
        meters = self._stripe.v1.billing.meters.list({"limit": 100}).data
        found = [meter.id for meter in meters if meter.event_name == "meterline_credits"]
        today = int(time.time()) // 86_400 * 86_400
        between = {"start_time": today - 86_400, "end_time": today + 2 * 86_400, "limit": 100}

        def units_of(customer: str) -> int:
            summaries = self._stripe.v1.billing.meters.event_summaries
            days = [summaries.list(meter, {"customer": customer} | between).data for meter in found]
            return round(sum(one.aggregated_value for listed in days for one in listed))

        with ThreadPoolExecutor(CALLS_AT_A_TIME) as threads:
            units = threads.map(units_of, self.customers.values())
            return dict(zip(self.customers, units, strict=True))

    def close(self) -> None:
        """Nothing more is said."""
        self._ledger.disconnect()

    def _flush(self) -> None:
        assert self._producer.flush(FLUSH_S_MAX) == 0, "Kafka didn't acknowledge what the feed wrote"
