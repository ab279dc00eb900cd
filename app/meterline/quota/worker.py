"""The quota worker: what it is made of, and how it is put together.

`meterline worker quota` runs it; so does `faust -A meterline.quota.worker worker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from meterline.clients import ClientRegistry
from meterline.contracts.codec import RecordCodec
from meterline.contracts.topics import CREDIT_ALERTS, CREDIT_GRANTS, USAGE_EVENTS, USAGE_TOTALS
from meterline.errors import RetryLater, UserError
from meterline.ledger.writer import LedgerWriter
from meterline.quota.grants import GrantLog
from meterline.quota.guardian import Guardian, GuardianParts
from meterline.quota.owner import QuotaOwner, QuotaParts
from meterline.quota.shards import Shards, open_shards
from meterline.quota.webhook import Webhook, follow_alerts
from meterline.settings import Settings, load_settings
from meterline.streaming.app import WorkerApp, WorkerPlan, build_app
from meterline.streaming.engine import EngineLimits
from meterline.streaming.log_ranges import read_log_ranges
from meterline.streaming.owner import PartitionOwner

__all__ = ["create_app"]

WEB_PORT = 6068
GUARDED_PARTITION = 0
"""Whoever owns it guards the buckets: there is one, and it is fenced."""

FLUSH_INTERVAL_S = 0.1
"""Metering publishes once a second; two looks at the end of the log lie between a total and its progress."""
PENDING_MAX = 50_000
"""Statements not yet understood: a few ten megabytes."""
IDLE_AFTER_S = 2.0
"""Nothing here depends on it."""
START_TIMEOUT_S = 30.0
"""How long a starting worker waits for Redis and for the client registry: longer than they take to start."""
START_PAUSE_S = 0.5
ANSWER_S_MAX = 5.0


def create_app(settings: Settings) -> WorkerApp:
    """The Faust app of a quota worker.

    Raises:
        UserError: the webhook's settings are wrong.
    """
    quota, kafka = settings.quota, settings.kafka
    webhook = Webhook(quota) if quota.webhook_url else None
    writer = LedgerWriter(settings.clickhouse)
    registry = ClientRegistry(settings)
    opened: list[Shards] = []

    def start_registry() -> None:
        registry.start()
        registry.wait_until_caught_up(START_TIMEOUT_S)

    async def open_owners(counts: Mapping[str, int]) -> Callable[[int], PartitionOwner]:
        await asyncio.to_thread(start_registry)
        shards = await _patiently(lambda: open_shards(settings.redis))
        opened.append(shards)
        topic_ids = await asyncio.to_thread(_topic_ids, settings)
        post_alerts = None
        if webhook is not None:
            post_alerts = partial(follow_alerts, kafka, webhook, counts[CREDIT_ALERTS])
        guardian = GuardianParts(
            settings=quota,
            store=shards,
            open_grants=lambda: GrantLog(kafka, counts[CREDIT_GRANTS]),
            clients=registry,
            writer=writer,
            source_topic_id=topic_ids[USAGE_EVENTS],
            count_partitions=_TotalsPartitions(settings).count,
            grants_topic_id=topic_ids[CREDIT_GRANTS],
            grant_codec=RecordCodec("credit-grant", kafka.registry_url),
            grant_partitions=counts[CREDIT_GRANTS],
            alert_codec=RecordCodec("credit-alert", kafka.registry_url),
            alert_partitions=counts[CREDIT_ALERTS],
            webhook=post_alerts,
        )
        parts = QuotaParts(
            store=shards,
            totals=RecordCodec("usage-total", kafka.registry_url),
            progress=RecordCodec("usage-progress", kafka.registry_url),
            source_topic_id=topic_ids[USAGE_EVENTS],
            make_companion=lambda p: Guardian(p, guardian) if p == GUARDED_PARTITION else None,
        )
        return lambda partition: QuotaOwner(partition, parts)

    async def close() -> None:
        await writer.close()
        for shards in opened:
            await shards.close()
        await asyncio.to_thread(registry.close)

    async def nothing_to_wait_for() -> None:
        """A restore reads nothing but Kafka; Redis away is waited for by the owner, while it reads."""

    return build_app(
        WorkerPlan(
            name="quota",
            source_topic=USAGE_TOTALS,
            other_topics=(CREDIT_GRANTS, CREDIT_ALERTS, USAGE_EVENTS),
            limits=EngineLimits(
                flush_interval_s=FLUSH_INTERVAL_S, pending_max=PENDING_MAX, idle_after_s=IDLE_AFTER_S
            ),
            web_port=WEB_PORT,
            open=open_owners,
            before_fencing=nothing_to_wait_for,
            close=close,
        ),
        settings,
    )


async def _patiently(ask: Callable[[], Awaitable[Shards]]) -> Shards:
    """Wait for Redis, as long as a start may take."""
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while True:
        try:
            return await ask()
        except RetryLater as error:
            if asyncio.get_running_loop().time() > deadline:
                raise UserError(
                    f"{error}. Start the local stack with `meterline up`, or set METERLINE_REDIS__URL"
                ) from error
            await asyncio.sleep(START_PAUSE_S)


def _topic_ids(settings: Settings) -> dict[str, str]:
    """Kafka's ids: a topic made anew under the same name is another one."""
    return {
        topic: read_log_ranges(settings.kafka, topic, [0])[0].topic_id
        for topic in (USAGE_EVENTS, CREDIT_GRANTS)
    }


class _TotalsPartitions:
    """Asks each second how many partitions usage.totals has: a new one counts from its birth on."""

    def __init__(self, settings: Settings) -> None:
        config: dict[str, Any] = settings.kafka.client_config()
        self._admin = AdminClient(config | {"error_cb": lambda _error: None, "log_level": 0})

    async def count(self) -> int:
        """As of now.

        Raises:
            RetryLater: Kafka doesn't answer.
        """
        try:
            known = await asyncio.to_thread(self._admin.list_topics, USAGE_TOTALS, ANSWER_S_MAX)
        except KafkaException as error:
            raise RetryLater(f"Kafka does not answer: {error.args[0].str()}") from None
        return len(known.topics[USAGE_TOTALS].partitions)


def __getattr__(name: str) -> Any:
    """`app`, made on first use: importing this module reads no setting and touches nothing."""
    if name != "app":
        raise AttributeError(name)
    app = globals()["app"] = create_app(load_settings())
    return app
