"""credit.grants, followed from its first record: what each client was given, brought into the buckets."""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import grant_from_record
from meterline.contracts.topics import CREDIT_GRANTS
from meterline.domain.clients import Client, Period, period_of
from meterline.domain.grants import ClientGrants, CreditGrant, GrantKind, GrantOutcome
from meterline.errors import DeadLetterError
from meterline.logs import get_logger
from meterline.quota.rows import GrantRow
from meterline.quota.shards import Op
from meterline.settings import KafkaSettings
from meterline.streaming.transactions import aiokafka_config

__all__ = ["GrantBook", "GrantLog", "grant_op"]

READ_WAIT_MS = 100
"""How long one look at the topic waits: a grant is rare, the guardian has other things to do."""
READ_RECORDS_MAX = 2_000

log = get_logger(__name__)


class GrantLog:
    """The records of credit.grants, committed ones only, each partition from its first."""

    def __init__(self, kafka: KafkaSettings, partitions: int) -> None:
        self._codec = RecordCodec("credit-grant", kafka.registry_url)
        self._places = [TopicPartition(CREDIT_GRANTS, number) for number in range(partitions)]
        self._fetched: list[Any] = []
        self._consumer: Any = AIOKafkaConsumer(
            **aiokafka_config(kafka),
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )

    async def start(self) -> None:
        """Begin at the first records."""
        await self._consumer.start()
        self._consumer.assign(self._places)
        await self._consumer.seek_to_beginning(*self._places)

    async def stop(self) -> None:
        """Let go of the connections."""
        await self._consumer.stop()

    async def read(self) -> list[tuple[Any, CreditGrant]]:
        """The next records and the grants in them, in the order of each partition.

        One that is not understood gives nothing and is logged: it must not stop the credits of all clients.
        """
        if not self._fetched:
            batches = await self._consumer.getmany(timeout_ms=READ_WAIT_MS, max_records=READ_RECORDS_MAX)
            self._fetched = [record for batch in batches.values() for record in batch]
        if not self._fetched:
            return []
        # In a thread: a registry may be asked. While it is away the records stay fetched.
        understood = await asyncio.to_thread(lambda: list(self._understood(self._fetched)))
        self._fetched = []
        return understood

    def _understood(self, records: Iterable[Any]) -> Iterator[tuple[Any, CreditGrant]]:
        for record in records:
            try:
                yield record, grant_from_record(self._codec.decode(record.value))
            except DeadLetterError as error:
                log.error(  # noqa: TRY400 - the record is at fault; a traceback would say nothing more
                    "record of credit.grants is not understood; it gives nothing",
                    partition=record.partition,
                    offset=record.offset,
                    reason=str(error),
                )

    async def is_at_end(self) -> bool:
        """Whether everything that was committed before this question has been read."""
        ends = await self._consumer.end_offsets(self._places)
        for place, end in ends.items():
            if await self._consumer.position(place) < end:
                return False
        return True


class GrantBook:
    """What each client was given, and what of it the buckets have not been told yet.

    Pure memory: the guardian reads, sends and forgets.
    """

    def __init__(self, client_of: Callable[[str], Client]) -> None:
        self.clients: dict[str, ClientGrants] = {}
        self._client_of = client_of
        self._untold: defaultdict[str, list[Op]] = defaultdict(list)
        self._looks: list[tuple[int, str]] = []
        """Heap: when (log time) a client with a budget may enter a new period."""

    def take(self, grant: CreditGrant) -> GrantOutcome:
        """Fold in the next record of the log."""
        grants = self.clients.setdefault(grant.client_id, ClientGrants())
        outcome = grants.take(grant)
        if outcome is GrantOutcome.APPLIED:
            if grant.kind is GrantKind.BASELINE:
                self._untold.pop(grant.client_id, None)  # void with the period they were for
            if (op := grant_op(grant)) is not None:
                self._untold[grant.client_id].append(op)
            if grants.budgets:
                heapq.heappush(self._looks, (0, grant.client_id))
        return outcome

    def take_all(self, log_records: Sequence[tuple[Any, CreditGrant]]) -> list[GrantRow]:
        """Fold in what was read; the rows say what became of each."""
        return [
            GrantRow(record.partition, record.offset, record.timestamp, grant, self.take(grant))
            for record, grant in log_records
        ]

    # -- telling the buckets

    def forget_told(self) -> None:
        """The buckets are empty: they must be told everything again."""
        self._untold.clear()
        for client_id, grants in self.clients.items():
            if ops := [op for op in map(grant_op, grants.standing()) if op is not None]:
                self._untold[client_id] = ops

    def untold(self, limit: int) -> list[tuple[str, list[Op]]]:
        """Clients and what their buckets must be told, in order; at most so many clients."""
        some = zip(range(limit), self._untold.items(), strict=False)
        return [(client_id, list(ops)) for _, (client_id, ops) in some]

    def told(self, calls: Sequence[tuple[str, list[Op]]]) -> None:
        """The buckets have it."""
        for client_id, ops in calls:
            left = self._untold[client_id][len(ops) :]
            if left:
                self._untold[client_id] = left
            else:
                del self._untold[client_id]

    @property
    def is_all_told(self) -> bool:
        """Whether the buckets know everything that was read."""
        return not self._untold

    # -- periods

    def look_again(self) -> None:
        """Clients' billing periods may have changed: look at every budget."""
        self._looks = [(0, client_id) for client_id, grants in self.clients.items() if grants.budgets]
        heapq.heapify(self._looks)

    def begins(self, clock_ms: int, limit: int) -> list[tuple[str, CreditGrant, Period]]:
        """Clients whose billing period begins now, by the log's clock: the budget that rules it, the period.

        The same client comes again only after its baseline was read back, or a look at all.
        """
        found: list[tuple[str, CreditGrant, Period]] = []
        seen = set()
        while self._looks and self._looks[0][0] <= clock_ms and len(found) < limit:
            _, client_id = heapq.heappop(self._looks)
            if client_id in seen:
                continue
            seen.add(client_id)
            grants = self.clients[client_id]
            period = period_of(self._client_of(client_id), clock_ms)
            begun = grants.baseline
            if begun is not None and (begun.period_start or 0) >= period.start:
                heapq.heappush(self._looks, (period.end, client_id))
            elif (budget := grants.budget_for(period.start)) is not None:
                found.append((client_id, budget, period))
            else:
                heapq.heappush(self._looks, (period.end, client_id))
        return found


def grant_op(grant: CreditGrant) -> Op | None:
    """What a bucket must be told; a budget alone tells it nothing, its periods' baselines do."""
    if grant.kind is GrantKind.PREPAID:
        return ["G", grant.grant_id, grant.credits_micro]
    if grant.kind is GrantKind.BASELINE:
        return ["P", grant.period_start, grant.base_micro, grant.credits_micro]
    return None
