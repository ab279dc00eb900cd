"""A client's billing period begins: its baseline goes to the log, where the first one wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import grant_to_record
from meterline.contracts.topics import CREDIT_GRANTS
from meterline.domain.clients import Period
from meterline.domain.grants import BaselinePart, CreditGrant, GrantKind, baseline_id
from meterline.errors import RetryLater
from meterline.quota.generation import Generation, judge, log_clock
from meterline.quota.grants import GrantBook
from meterline.quota.scripts import ShardState
from meterline.quota.shards import Shards
from meterline.streaming.owner import Output

__all__ = ["Periods"]

PERIODS_PER_LOOK_MAX = 500
"""Each reads a bucket and writes a record: the month of a hundred thousand clients begins within minutes, for
each at its own instant."""


class Periods:
    """Looks whose period has begun, by the log's clock, and makes its baseline."""

    def __init__(
        self,
        *,
        book: GrantBook,
        store: Shards,
        codec: RecordCodec,
        partitions: int,
        registry_version: Callable[[], int],
        clock_ms: Callable[[], int],
    ) -> None:
        """`partitions`: of credit.grants."""
        self._book = book
        self._store = store
        self._codec = codec
        self._partitions = partitions
        self._registry_version = registry_version
        self._looked_at_version = -1
        self._clock_ms = clock_ms

    async def begun(self, known: Generation, states: Sequence[ShardState]) -> list[Output]:
        """Records of the baselines that are due. Empty while a partition of the log hasn't been heard of.

        Raises:
            RetryLater: Redis is away, or not what it was; nothing is forgotten.
        """
        clocks = [log_clock(state) for state in states]
        times = [clock for clock in clocks if clock]  # 0: of an empty log
        if len(times) < len(clocks):
            return []
        if (version := self._registry_version()) != self._looked_at_version:
            self._looked_at_version = version
            self._book.look_again()
        due = self._book.begins(min(times), PERIODS_PER_LOOK_MAX)
        if not due:
            return []
        try:
            baselines = [await self._baseline(known, *one) for one in due]
            # What was read must be all there is: an emptied Redis would give a base of nothing, for ever.
            if lost := judge(known, await self._store.states(), durable=False).lost:
                why = f"the credit buckets went away while periods began: {lost}"
                raise RetryLater(why)  # noqa: TRY301 - caught here, like what the reads raise
        except RetryLater:
            self._book.look_again()
            raise
        return [self._output(baseline) for baseline in baselines]

    async def _baseline(
        self, known: Generation, client_id: str, budget: CreditGrant, period: Period
    ) -> CreditGrant:
        totals = await self._store.lifetimes(client_id, known.number)
        return CreditGrant(
            grant_id=baseline_id(client_id, period.start),
            client_id=client_id,
            kind=GrantKind.BASELINE,
            credits_micro=budget.credits_micro,
            granted_at=self._clock_ms(),
            granted_by="quota",
            reason=f"period began; budget {budget.grant_id}",
            period_start=period.start,
            period_end=period.end,
            base=tuple(
                BaselinePart(topic_id, partition, cutoff, life)
                for (topic_id, partition), (cutoff, life) in sorted(totals.items())
            ),
        )

    def _output(self, grant: CreditGrant) -> Output:
        key = grant.client_id.encode()
        value = self._codec.encode(grant_to_record(grant))
        return Output(CREDIT_GRANTS, partition_for(key, self._partitions), key, value)
