"""`FakeMeter`: for the tests of programs that use a `Meter`. No Kafka, no Redis, no files."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack

from meterline.domain.events import UsageEvent
from meterline.quota import FakeCreditBuckets
from meterline.task.desk import Desk
from meterline.task.holds import HeldReservations
from meterline.task.lanes import Published
from meterline.task.meter import Meter, MeterConnection
from meterline.task.records import SpooledEvents
from meterline.task.settling import Settler

__all__ = ["FakeMeter"]

TTL_S = 60.0


class FakeMeter(MeterConnection):
    """A meter that publishes into a list and asks buckets in memory.

        fake = FakeMeter()
        fake.buckets.grant("acme", 100)
        async with fake as meter:                   # or: with fake as meter
            await my_worker(meter)
        assert [event.sku for event in fake.published] == ["gpu-second"]

    Everything else is the real thing: what is refused, when a hold is given back, which ids the events have.
    When a task's block is left, its usage is published and settled. To be entered once.

    Attributes:
        buckets: give clients credits there, and look at their balances.
        published: the events in order; one that is published again is there again.
    """

    def __init__(self, buckets: FakeCreditBuckets | None = None) -> None:
        super().__init__(self._open)
        self.buckets = FakeCreditBuckets() if buckets is None else buckets
        self.published: list[UsageEvent] = []

    async def _open(self, closing: AsyncExitStack) -> Meter:
        holds = HeldReservations(self.buckets, TTL_S, TTL_S)
        log = _Log(self.published, Settler(self.buckets, holds))
        desk = Desk(self.buckets, log, holds, ttl_s=TTL_S)
        closing.push_async_callback(desk.end)
        return Meter(desk, lambda: True)


class _Log:
    """Stands for spool, Kafka and drainer."""

    def __init__(self, published: list[UsageEvent], settler: Settler) -> None:
        self._published = published
        self._settler = settler
        self._records = SpooledEvents()

    def admit(self) -> None:
        """There is always room."""

    def release(self) -> None:
        """Nothing was kept."""

    def append(self, records: Sequence[bytes]) -> Future[None]:
        """Publish and settle; then it is durable."""
        done: Future[None] = Future()
        told = []
        for record in records:
            event, final = self._records.decode(record)
            told.append(Published(event, final, "fake", 0, len(self._published)))
            self._published.append(event)
        self._settler.add(told)
        settling = asyncio.ensure_future(self._settler.settle_all())
        settling.add_done_callback(lambda _: done.set_result(None))
        return done
