"""The metering worker: what it is made of, and how it is put together.

`meterline worker metering` runs it; so does `faust -A meterline.metering.worker worker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from meterline.contracts.codec import RecordCodec
from meterline.contracts.topics import USAGE_EVENTS, USAGE_EVENTS_DLQ, USAGE_TOTALS, USAGE_WINDOWS
from meterline.domain.events import UsageEvent
from meterline.errors import UserError
from meterline.ledger.reader import LedgerReader
from meterline.ledger.writer import LedgerWriter
from meterline.metering.fast import load_fast_path
from meterline.metering.meter import Meter
from meterline.metering.owner import MeteringOwner, MeteringTools
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SliceFiles
from meterline.metering.state import GROUP, Meta
from meterline.settings import MeteringSettings, Settings, load_settings
from meterline.streaming.app import WorkerApp, WorkerPlan, build_app
from meterline.streaming.engine import EngineLimits
from meterline.streaming.owner import PartitionOwner

__all__ = ["create_app"]

WEB_PORT = 6066

PENDING_EVENTS_PLAIN, PENDING_EVENTS_FAST = 60_000, 200_000
"""The most that is pending where the settings don't say: 60 to 80 MB."""


def create_app(settings: Settings) -> WorkerApp:
    """The Faust app of a metering worker."""
    metering = settings.metering
    writer = LedgerWriter(settings.clickhouse)
    reader = LedgerReader(settings.clickhouse)
    registry = settings.kafka.registry_url
    events = RecordCodec("usage-event", registry)
    fast = load_fast_path() if metering.fast_path else None

    async def open_owners(counts: Mapping[str, int]) -> Callable[[int], PartitionOwner]:
        for topic, what in ((USAGE_EVENTS_DLQ, "a dead letter"), (USAGE_TOTALS, "a total")):
            if counts[topic] < counts[USAGE_EVENTS]:
                raise UserError(
                    f"{topic} has {counts[topic]} partitions, fewer than {USAGE_EVENTS} with "
                    f"{counts[USAGE_EVENTS]}: {what} keeps its partition. See: meterline topics plan"
                )
        if fast is not None:
            await asyncio.to_thread(fast.warm_up)  # before the group knows us: nobody waits for the compiler
        tools = MeteringTools(
            settings=metering,
            writer=writer,
            reader=reader,
            events=events,
            windows=RecordCodec("usage-window", registry),
            totals=RecordCodec("usage-total", registry),
            progress=RecordCodec("usage-progress", registry),
            dead_letters=RecordCodec("dead-letter", registry),
            window_partitions=counts[USAGE_WINDOWS],
            make_meter=make_meter
            if fast is None
            else partial(fast.make_meter, heads=partial(events.heads, 1)),
        )
        return lambda partition: MeteringOwner(partition, tools)

    async def close() -> None:
        reader.close()
        await writer.close()

    return build_app(
        WorkerPlan(
            name=GROUP,
            source_topic=USAGE_EVENTS,
            other_topics=(USAGE_WINDOWS, USAGE_TOTALS, USAGE_EVENTS_DLQ),
            limits=EngineLimits(
                flush_interval_s=metering.flush_interval_ms / 1000,
                pending_max=metering.pending_events_max
                or (PENDING_EVENTS_PLAIN if fast is None else PENDING_EVENTS_FAST),
                idle_after_s=metering.idle_after_ms / 1000,
            ),
            web_port=WEB_PORT,
            open=open_owners,
            before_fencing=reader.wait_until_up,  # the dedupe index is rebuilt from the ledger
            close=close,
            in_batches=fast is not None,
            checksum=fast.fast_crc32c() if fast is not None else None,
        ),
        settings,
    )


def make_meter(
    partition: int, settings: MeteringSettings, decode: Callable[[bytes | None], UsageEvent], meta: Meta
) -> Meter:
    """The plain meter, which needs nothing but Python."""
    return Meter(partition, settings, decode, meta, SlicedIndex(SliceFiles.of(settings)))


def __getattr__(name: str) -> Any:
    """`app`, made on first use: importing this module reads no setting and touches nothing."""
    if name != "app":
        raise AttributeError(name)
    app = globals()["app"] = create_app(load_settings())
    return app
