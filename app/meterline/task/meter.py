"""`Meter`: no work starts without credits, and no finished work is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from meterline.domain.clients import QuotaPolicy
from meterline.domain.events import UsageEvent
from meterline.errors import RetryLater, StopError
from meterline.producer.usage import UsageProducer
from meterline.quota import CreditBuckets
from meterline.quota.loop_thread import LoopThread
from meterline.settings import Settings, load_settings
from meterline.task.attempt import Task
from meterline.task.desk import Buckets, Credits, Desk
from meterline.task.drain import Drainer
from meterline.task.holds import HeldReservations
from meterline.task.lanes import Published
from meterline.task.policies import ClientPolicies
from meterline.task.settling import Settler
from meterline.task.slots import take_slot
from meterline.task.spool import Spool
from meterline.task.sync import SyncMeter
from meterline.task.topic_id import TopicIdentity

__all__ = ["Meter", "MeterConnection"]

CLOSE_S_MAX = 10.0
"""Within Kubernetes' default grace between SIGTERM and SIGKILL, beside the program's own end. What is not in
Kafka by then is in the spool, and the next process brings it there."""
FLUSH_POLL_S = 0.02
DEFAULT_SPOOL_DIR = "meterline-spool"
NEVER_GIVE_UP = {"message.timeout.ms": 0}
"""The spool is durable and the drainer's window bounds the memory: the producer may try for days, in
order."""

log = logging.getLogger("meterline.task")


class Meter:
    """Reserves, keeps and settles for all tasks of a process.

        async with Meter.connect() as meter:
            async with meter.task(client_id="acme", sku="gpu", credits=20, correlation_id=job.id) as task:
                seconds = await work(job)
                task.charge(sku="gpu", credits=seconds)

    With plain `with`, the same for threads. The work starts when the credits are set aside. The block is left
    when its usage is durable in the local spool: it reaches Kafka once Kafka is there, also after this
    process or this machine has died. Without `charge` the task costs what was reserved; an exception before
    any charge costs nothing; charges are billed whatever happens after them.

    It must be created after a fork, in the process that works.
    """

    def __init__(self, desk: Desk, is_drained: Callable[[], bool]) -> None:
        """See `connect`."""
        self._desk = desk
        self._is_drained = is_drained

    @classmethod
    def connect(
        cls,
        settings: Settings | None = None,
        *,
        buckets: Buckets | None = None,
        policy: Callable[[str], QuotaPolicy] | None = None,
        close_timeout_s: float = CLOSE_S_MAX,
    ) -> MeterConnection:
        """To be entered with `async with` or `with`. Neither Kafka nor Redis need be there.

        Args:
            settings: None reads the environment (`METERLINE_QUOTA__SPOOL_DIR`, ...).
            buckets: credit buckets that are connected already, of the same event loop, for example with
            leases. policy: what a client's work does while Redis is away; None: what the client registry
            says. close_timeout_s: how long leaving waits for Kafka to take what is spooled.

        Raises (when entered):
            UserError: the settings are wrong, or no directory can be had.
            SpoolFull, SpoolFailed: the disk.
            SpoolCorrupt: usage left behind can't be read; nothing was deleted.
        """
        settings = settings or load_settings()
        return MeterConnection(partial(_open_meter, settings, buckets, policy, close_timeout_s))

    def task(
        self,
        *,
        client_id: str,
        sku: str,
        credits: Credits,  # noqa: A002 - the domain's word; nobody calls the interpreter's credits()
        correlation_id: str,
        attributes: Mapping[str, str] | None = None,
        source: str = "",
    ) -> Task:
        """A piece of work, to be done inside `async with`.

        Args:
            client_id: who pays.
            sku: what is used, when `charge` is never called.
            credits: set aside for it; charged on success when `charge` is never called.
            correlation_id: the task; the same when it is run again.
            attributes: texts for the receipt.
            source: which program or machine.

        Raises (when entered; the work has not started):
            InvalidUsage: metering would refuse this usage.
            CreditsExhausted: the client has too few credits.
            QuotaUnavailable: Redis is away, and the client's policy is to deny then.
            SpoolFull: no room for finished usage.
            SpoolFailed, SpoolCorrupt: the disk of the spool is broken.

        Raises (when left):
            SpoolFailed: the usage is not durable.
            InvalidUsage: other usage was charged under the same id meanwhile.
        """
        return Task(
            self._desk,
            client_id=client_id,
            sku=sku,
            credits=credits,
            correlation_id=correlation_id,
            attributes=attributes,
            source=source,
        )

    async def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until all finished usage is acknowledged by Kafka and settled. Nobody has to.

        Raises:
            RetryLater: not within `timeout_s`; it is in the spool.
        """
        deadline = time.monotonic() + timeout_s
        while not (self._is_idle() and await self._is_still_idle()):
            self._desk.require_sound()
            if time.monotonic() >= deadline:
                raise RetryLater(
                    f"not all finished usage is in Kafka after {timeout_s} s; it is in the spool"
                )
            await asyncio.sleep(FLUSH_POLL_S)

    def _is_idle(self) -> bool:
        return not self._desk.is_busy and self._is_drained()

    async def _is_still_idle(self) -> bool:
        """After what the drainer has told by now has arrived on this loop."""
        await asyncio.sleep(0)
        return self._is_idle()


class MeterConnection:
    """What `connect` gives: `async with` for one event loop, `with` for threads. To be entered once."""

    def __init__(self, open_meter: Callable[[AsyncExitStack], Awaitable[Meter]]) -> None:
        self._open_meter = open_meter
        self._closing = AsyncExitStack()
        self._thread: LoopThread | None = None

    async def __aenter__(self) -> Meter:
        try:
            return await self._open_meter(self._closing)
        except BaseException:  # cancelled, too: what was opened is closed
            await self._closing.aclose()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._closing.__aexit__(kind, error, trace)
        except StopError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what went wrong first stays what is raised

    def __enter__(self) -> SyncMeter:
        self._thread = LoopThread("Meter")
        try:
            return SyncMeter(self._thread.run(self.__aenter__()), self._thread)
        except BaseException:  # Ctrl-C, too: no thread stays behind
            self._thread.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        try:
            self._thread.run(self.__aexit__(kind, error, trace), is_cancelled_with_us=False)
        finally:
            self._thread.stop()


async def _open_meter(
    settings: Settings,
    buckets: Buckets | None,
    policy: Callable[[str], QuotaPolicy] | None,
    close_timeout_s: float,
    closing: AsyncExitStack,
) -> Meter:
    """The composition root: what is opened last is closed first."""
    quota = settings.quota
    if buckets is None:
        if policy is None:
            policy = policies = ClientPolicies(settings).start()
            closing.push_async_callback(asyncio.to_thread, policies.close)
        buckets = await closing.enter_async_context(
            CreditBuckets.connect(
                settings.redis.url,
                namespace=settings.redis.namespace,
                timeout_ms=quota.timeout_ms,
                batch_window_us=quota.batch_window_us,
                policy=policy,
            )
        )
    ttl_s = min(quota.reservation_ttl_s, quota.reservation_ttl_max_s)
    holds = HeldReservations(buckets, ttl_s, quota.reservation_ttl_max_s)
    settler = Settler(buckets, holds)
    loops = [await closing.enter_async_context(_running(work)) for work in (holds.run(), settler.run())]

    root = Path(quota.spool_dir or DEFAULT_SPOOL_DIR)
    slot = closing.enter_context(await asyncio.to_thread(take_slot, root))
    spool = await asyncio.to_thread(Spool, slot.path, quota.spool_bytes_max)
    closing.push_async_callback(asyncio.to_thread, spool.close)
    here = asyncio.get_running_loop()

    def found(event: UsageEvent) -> None:
        if event.reservation_id is not None:
            here.call_soon_threadsafe(holds.find, event.reservation_id, event.client_id)

    def published(events: list[Published]) -> None:
        here.call_soon_threadsafe(settler.add, events)

    drainer = Drainer(
        root,
        bytes_max=quota.spool_bytes_max,
        new_producer=lambda: UsageProducer(settings, client_config=NEVER_GIVE_UP),
        topic_id=TopicIdentity(settings.kafka).current,
        on_published=published,
        on_found=found,
    )

    def require_sound() -> None:
        if drainer.failure is not None:
            raise drainer.failure
        for loop in loops:
            if loop.done():
                loop.result()

    desk = Desk(buckets, spool, holds, ttl_s=ttl_s, require_sound=require_sound)
    meter = Meter(desk, lambda: drainer.is_idle and settler.is_idle)

    async def close() -> None:
        await desk.end()
        try:
            await meter.flush(close_timeout_s)
        except RetryLater as late:
            log.warning("finished usage is left for the next process: %s", late)
        finally:
            await asyncio.to_thread(drainer.stop)
            await settler.settle_all()

    await asyncio.to_thread(drainer.start, spool)
    closing.push_async_callback(close)
    await asyncio.to_thread(spool.start, drainer.wake)
    return meter


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Let it run inside the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
