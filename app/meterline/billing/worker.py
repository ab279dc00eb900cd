"""The billing worker: what it is made of, and how it is put together.

`meterline worker billing` runs it; so does `faust -A meterline.billing.worker worker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import stamina

from meterline.billing.clock import Clock, StripeClock
from meterline.billing.meters import load_meters
from meterline.billing.notices import NoticeBoard
from meterline.billing.owner import BillingOwner, BillingParts
from meterline.billing.pace import Pace
from meterline.billing.send import StripeSender, stripe_client
from meterline.billing.stripe_meters import ensure_meters
from meterline.billing.stripe_reads import StripeReads
from meterline.billing.switches import Switches
from meterline.billing.verify import LedgerVerifier
from meterline.clients import ClientRegistry
from meterline.contracts.codec import RecordCodec
from meterline.contracts.topics import USAGE_WINDOWS
from meterline.errors import RetryLater, UserError
from meterline.ledger.reader import LedgerReader
from meterline.ledger.writer import LedgerWriter
from meterline.settings import Settings, load_settings
from meterline.streaming.app import WorkerApp, WorkerPlan, build_app
from meterline.streaming.engine import EngineLimits
from meterline.streaming.owner import PartitionOwner

__all__ = ["create_app"]

WEB_PORT = 6067

START_TIMEOUT_S = 30.0
"""How long a starting worker waits for Stripe and for the client registry: longer than they take to start."""


def create_app(settings: Settings, clock: Clock | None = None) -> WorkerApp:
    """The Faust app of a billing worker.

    Args:
        clock: another one for whoever simulates months.

    Raises:
        UserError: the meters file is wrong.
    """
    billing = settings.billing
    meters = load_meters(billing.meters_file)
    clock = clock or StripeClock()
    client = stripe_client(settings.stripe, clock)
    pace = Pace(billing.requests_per_second)
    sender = StripeSender(client, pace, clock=clock, paused=billing.sending_paused)
    reads = StripeReads(stripe_client(settings.stripe, clock, pace))
    writer = LedgerWriter(settings.clickhouse)
    reader = LedgerReader(settings.clickhouse)
    registry = ClientRegistry(settings)

    def prepare() -> Mapping[str, str]:
        registry.start()
        registry.wait_until_caught_up(START_TIMEOUT_S)
        try:
            for attempt in stamina.retry_context(on=RetryLater, timeout=START_TIMEOUT_S, attempts=None):
                with attempt:
                    return ensure_meters(client, meters.meters).ids
        except RetryLater as error:
            raise UserError(
                f"{error}. Start the local stack with `meterline up`, or correct METERLINE_STRIPE__API_KEY "
                "or METERLINE_STRIPE__SANDBOX_URL"
            ) from error
        raise AssertionError("retries end with a return or an error")

    async def open_owners(counts: Mapping[str, int]) -> Callable[[int], PartitionOwner]:
        pace.partitions = counts[USAGE_WINDOWS]
        meter_ids = await asyncio.to_thread(prepare)
        parts = BillingParts(
            settings=billing,
            codec=RecordCodec("usage-window", settings.kafka.registry_url),
            meters=meters,
            meter_ids=meter_ids,
            clients=registry,
            reader=LedgerVerifier(reader),
            writer=writer,
            sender=sender,
            reads=reads,
            board=NoticeBoard(reads, clock),
            switches=Switches(registry),
            clock=clock,
        )
        return lambda partition: BillingOwner(partition, parts)

    async def close() -> None:
        sender.close()
        reads.close()
        reader.close()
        await writer.close()
        await asyncio.to_thread(registry.close)

    return build_app(
        WorkerPlan(
            name="billing",
            source_topic=USAGE_WINDOWS,
            other_topics=(),
            limits=EngineLimits(
                flush_interval_s=billing.flush_interval_ms / 1000,
                pending_max=billing.pending_windows_max,
                idle_after_s=settings.metering.idle_after_ms / 1000,
            ),
            web_port=WEB_PORT,
            open=open_owners,
            before_fencing=reader.wait_until_up,  # a restore asks the ledger how far billing got
            close=close,
        ),
        settings,
    )


def __getattr__(name: str) -> Any:
    """`app`, made on first use: importing this module reads no setting and touches nothing."""
    if name != "app":
        raise AttributeError(name)
    app = globals()["app"] = create_app(load_settings())
    return app
