"""Credit buckets for tests: the same words and the same rules, in memory, without Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Final, Self

from meterline.domain.buckets import Bucket, Shard
from meterline.quota import operations
from meterline.quota.answers import Credits, micro_of
from meterline.quota.availability import Availability, Unreachable
from meterline.quota.buckets import CreditBuckets, Policy, deny
from meterline.quota.loop_thread import LoopThread
from meterline.quota.sync import SyncCreditBuckets

__all__ = ["FakeCreditBuckets"]

GENERATION: Final = 1
NO_GRANTS: Final[Mapping[str, Credits]] = MappingProxyType({})


class FakeCreditBuckets(CreditBuckets):
    """`CreditBuckets` whose buckets are in memory.

        buckets = FakeCreditBuckets({"acme": 100})
        await work(buckets)                               # code that takes CreditBuckets
        assert buckets.held("acme") == {}

        with FakeCreditBuckets({"acme": 100}) as buckets: # code that takes SyncCreditBuckets
            work(buckets)

    What it can't show: time. Nothing expires before `expire`, and nothing is accounted before `account`.
    """

    def __init__(
        self,
        grants: Mapping[str, Credits] = NO_GRANTS,
        *,
        policy: Policy = deny,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open buckets.

        Args:
            grants: credits of each client; others have none.
            policy: what is allowed while the fake is away or closed.
            clock: seconds since the epoch.
        """
        self._memory = _Memory(clock)
        self._thread: LoopThread | None = None
        super().__init__(self._memory, policy, None)
        for client_id, amount in grants.items():
            self.grant(client_id, amount)

    def grant(self, client_id: str, credits: Credits) -> None:  # noqa: A002 - the word everybody uses
        """Give a client credits."""
        self._memory.grants += 1
        self._memory.bucket(client_id).grant(f"grant-{self._memory.grants}", micro_of(credits))

    def held(self, client_id: str) -> dict[str, int]:
        """Micro-credits set aside now, by reservation id."""
        records = self._memory.bucket(client_id).records
        return {rid: record.hold for rid, record in records.items() if record.state == "held"}

    def account(self) -> None:
        """The log charges what was settled: provisional credits become consumed ones."""
        for bucket in self._memory.buckets.values():
            for (topic_id, partition, offset), micro in sorted(bucket.provisional):
                _, life = bucket.totals.get((topic_id, partition), (-1, 0))
                bucket.total(topic_id, partition, offset, life + micro)

    def expire(self) -> None:
        """Everything set aside has outlived its time."""
        for bucket in self._memory.buckets.values():
            for record in bucket.records.values():
                record.time = min(record.time, 0) if record.state == "held" else record.time
            shard = bucket.shard
            shard.partitions, shard.topic_id = 1, "usage.events"
            shard.accounted_until[shard.topic_id, 0] = max(1, self._memory.now_ms())
            bucket.expire(self._memory.now_ms())

    @property
    def is_away(self) -> bool:
        """Whether calls find nobody. Set it."""
        return self._memory.availability.tripped

    @is_away.setter
    def is_away(self, away: bool) -> None:
        self._memory.availability.tripped = away

    @property
    def is_closed(self) -> bool:
        """Whether the buckets are as while they are rebuilt: nothing is reserved. Set it."""
        return not self._memory.shard.open

    @is_closed.setter
    def is_closed(self, closed: bool) -> None:
        self._memory.shard.open = not closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __enter__(self) -> SyncCreditBuckets:
        self._thread = LoopThread("CreditBuckets")
        return SyncCreditBuckets(self, self._thread.run)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.stop()


class _Memory:
    """What the routes are for the real buckets."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.availability = Availability(self._nobody)
        self.shard = Shard()
        self.shard.begin(GENERATION, partitions=1, topic_id="usage.events", skew_ms=0)
        self.shard.open_up(GENERATION)
        self.buckets: dict[str, Bucket] = {}
        self.grants = 0
        self._clock = clock

    def route(self, _client_id: str) -> Self:
        return self

    def bucket(self, client_id: str) -> Bucket:
        if client_id not in self.buckets:
            self.buckets[client_id] = Bucket(self.shard)
        return self.buckets[client_id]

    def now_ms(self) -> int:
        return int(self._clock() * 1_000)

    def submit(self, client_id: str, op: operations.Op) -> asyncio.Future[bytes]:
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        answered.set_result(self.bucket(client_id).apply(operations.as_array(op), self.now_ms()).encode())
        return answered

    submit_first = submit

    async def close(self) -> None:
        pass

    async def _nobody(self) -> None:
        raise Unreachable("the fake was told to be away")
