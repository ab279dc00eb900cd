"""The guardian of the buckets, beside the owner of partition 0: one for all, fenced like its partition.

    each second: is Redis still what it was? -> heartbeat -> grants -> open -> sweep -> alerts -> new periods

Everything it must not do twice is committed in Kafka first, as the fenced owner of the partition: a stalled
guardian that wakes up is refused by the broker before it can begin a generation, a period or an alert.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from aiokafka.errors import KafkaError

from meterline.clients import ClientRegistry
from meterline.contracts.codec import RecordCodec
from meterline.domain.alerts import CreditAlert
from meterline.domain.buckets import parse_balance
from meterline.domain.clients import Client
from meterline.errors import RetryLater, WorkerMustExit
from meterline.ledger.writer import LedgerWriter
from meterline.logs import get_logger
from meterline.metrics import (
    CREDIT_ALERTS_RAISED,
    QUOTA_GENERATIONS,
    QUOTA_HOLDS_EXPIRED,
    QUOTA_LOG_CLOCK_SECONDS,
    QUOTA_OPEN,
    QUOTA_PERIODS_BEGUN,
)
from meterline.quota.alerts import AlertBook, alert_output, epoch_of
from meterline.quota.generation import Generation, judge, log_clock, may_open
from meterline.quota.grants import GrantBook, GrantLog
from meterline.quota.keeper import GrantKeeper
from meterline.quota.keys import SHARDS, shard_of
from meterline.quota.owner import CommitState
from meterline.quota.periods import Periods
from meterline.quota.scripts import ShardState
from meterline.quota.shards import Op, Shards
from meterline.quota.state import alerts_prefix, generation_key, ledger_key
from meterline.settings import QuotaSettings

__all__ = ["Guardian", "GuardianParts"]

TICK_S = 1.0
CLIENTS_PER_CALL = 500
"""Buckets in one round trip: a few milliseconds of the server's time."""
SWEPT_PER_SHARD_MAX = 200
"""Clients swept in a shard each second, 12,800 in all; the others are next, in order of their deadlines."""
TOUCHED_PER_SHARD_MAX = 200
"""Likewise for alerts; the others stay on the list."""
RETRY_PAUSE_S = 0.5

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GuardianParts:
    """What a guardian works with.

    Attributes:
        source_topic_id: Kafka's id of usage.events.
        count_partitions: of usage.totals, now; a hold may expire only when each of them is accounted.
        grants_topic_id: Kafka's id of credit.grants.
        webhook: posts alerts until it is cancelled; None: nobody wants them.
    """

    settings: QuotaSettings
    store: Shards
    open_grants: Callable[[], GrantLog]
    clients: ClientRegistry
    writer: LedgerWriter
    source_topic_id: str
    count_partitions: Callable[[], Awaitable[int]]
    grants_topic_id: str
    grant_codec: RecordCodec
    grant_partitions: int
    alert_codec: RecordCodec
    alert_partitions: int
    webhook: Callable[[], Awaitable[None]] | None = None
    clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000


class Guardian:
    """Runs as one task from `start` to `close`; `owner.Companion` is its contract with the owner."""

    def __init__(self, partition: int, parts: GuardianParts) -> None:
        self._partition = partition
        self._parts = parts
        self._store = parts.store
        self._task: asyncio.Task[None] | None = None
        self._book = GrantBook(self._client)
        self._is_believed = False
        """At the last look Redis was what we know."""
        self._to_check: dict[str, bool] = {}
        """Clients whose alerts must be looked at; True: work of theirs was refused."""
        self._commit: CommitState
        self._known: Generation
        self._alerts: AlertBook
        self._grants: GrantLog
        self._keeper: GrantKeeper
        self._periods: Periods

    # -- as a companion

    def start(self, state: Mapping[bytes, bytes], commit: CommitState) -> None:
        """Begin; see Companion.

        Raises:
            PartitionHalted: the state isn't of this credit.grants, or of a newer version.
        """
        self.take_over(state, commit)
        self._task = asyncio.create_task(self._run())

    def take_over(self, state: Mapping[bytes, bytes], commit: CommitState) -> None:
        """Know what the changelog knows."""
        parts = self._parts
        self._commit = commit
        self._known = Generation.from_bytes(state.get(generation_key(self._partition)))
        self._alerts = AlertBook(alerts_prefix(self._partition), state, self._client)
        self._grants = parts.open_grants()
        self._keeper = GrantKeeper(
            grants=self._grants,
            book=self._book,
            store=self._store,
            writer=parts.writer,
            topic_id=parts.grants_topic_id,
            saved=state.get(ledger_key(self._partition)),
        )
        self._periods = Periods(
            book=self._book,
            store=self._store,
            codec=parts.grant_codec,
            partitions=parts.grant_partitions,
            registry_version=lambda: parts.clients.version,
            clock_ms=parts.clock_ms,
        )

    def check(self) -> None:
        """Raise what it ended with, if it ended; see Companion."""
        if self._task is not None and self._task.done():
            self._task.result()
            raise WorkerMustExit("the guardian of the credit buckets ended")

    def close(self) -> None:
        """The partition is lost; see Companion."""
        if self._task is not None:
            self._task.cancel()
        QUOTA_OPEN.set(0)

    async def _run(self) -> None:
        await self._grants.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch())
                tasks.create_task(self._keeper.fill_ledger(ledger_key(self._partition), self._commit))
                if self._parts.webhook is not None:
                    tasks.create_task(_call(self._parts.webhook))
        finally:
            await self._grants.stop()

    async def _watch(self) -> None:
        next_tick_at, warned = 0.0, ""
        while True:
            try:
                if await self._keeper.read() and self._is_believed:
                    await self._keeper.tell()
                if time.monotonic() >= next_tick_at:
                    next_tick_at = time.monotonic() + TICK_S
                    await self.tick()
                warned = ""
            except (RetryLater, KafkaError) as error:
                self._is_believed = False
                QUOTA_OPEN.set(0)
                if (text := str(error) or type(error).__name__) != warned:
                    log.warning("waiting for Redis or Kafka", error=text)
                    warned = text
                await asyncio.sleep(RETRY_PAUSE_S)

    def _client(self, client_id: str) -> Client:
        try:
            return self._parts.clients.get(client_id) or Client(client_id)
        except RetryLater as error:  # it never goes on by itself: only a restart reads the registry again
            raise WorkerMustExit(f"the client registry stopped: {error}") from error

    # -- generation

    async def tick(self) -> None:
        """Look, and do what is due."""
        parts = self._parts
        partitions = await parts.count_partitions()
        states = await self._store.states()
        durable = await self._store.is_durable() if any(not state.trusted for state in states) else False
        verdict = judge(self._known, states, durable=durable)
        if verdict.lost:
            await self._begin(states, partitions, verdict.lost)
            return
        if verdict.restarted:
            log.warning(
                "Redis was restarted and lost nothing: its buckets go on", generation=self._known.number
            )
            await self._store.adopt(self._known.number, verdict.restarted)
        beat = self._known.beat + 1
        self._is_believed = await self._store.beat(
            self._known.number, beat, partitions=partitions, topic_id=parts.source_topic_id
        )
        if not self._is_believed:
            return  # the next look says why
        await self._remember(replace(self._known, beat=beat))
        await self._keeper.tell()
        states = await self._store.states()
        await self._open(states)
        await self._sweep()
        await self._look_at_alerts([number for number, state in enumerate(states) if state.open])
        if self._keeper.is_complete and (begun := await self._periods.begun(self._known, states)):
            await self._commit((), begun)
            QUOTA_PERIODS_BEGUN.inc(len(begun))
        self._show(states)

    async def _begin(self, states: Sequence[ShardState], partitions: int, why: str) -> None:
        """A new, closed generation: remembered first, so that no other guardian can begin one meanwhile."""
        parts = self._parts
        self._is_believed = False
        QUOTA_OPEN.set(0)
        known = self._known.next(states, parts.clock_ms(), durable=await self._store.is_durable())
        await self._remember(known)
        await self._store.begin(
            known.number,
            partitions=partitions,
            topic_id=parts.source_topic_id,
            skew_ms=parts.settings.clock_skew_ms,
        )
        self._keeper.forget_told()
        QUOTA_GENERATIONS.inc()
        log.warning("credit buckets are rebuilt", generation=known.number, why=why)

    async def _remember(self, known: Generation) -> None:
        await self._commit([(generation_key(self._partition), known.to_bytes())], ())
        self._known = known

    async def _open(self, states: Sequence[ShardState]) -> None:
        settings, known = self._parts.settings, self._known
        ttl_max_ms = int(settings.reservation_ttl_max_s * 1000)
        ready = [
            number
            for number, state in enumerate(states)
            if not state.open and may_open(state, known, ttl_max_ms, settings.clock_skew_ms)
        ]
        if not ready or not await self._keeper.has_told_all():
            return
        if not known.opened:
            await self._remember(replace(known, opened=True))
        await self._store.open(known.number, ready)
        log.info("credit buckets are open", generation=known.number, shards=len(ready))
        self._look_at_everybody()

    # -- sweep

    async def _sweep(self) -> None:
        due = await self._store.due(self._parts.clock_ms(), SWEPT_PER_SHARD_MAX)
        for first in range(0, len(due), CLIENTS_PER_CALL):
            calls: list[tuple[str, Sequence[Op]]] = [
                (c, [["e"]]) for c in due[first : first + CLIENTS_PER_CALL]
            ]
            for (answer,) in await self._store.run(calls):
                if answer.startswith("ok "):
                    QUOTA_HOLDS_EXPIRED.inc(int(answer[3:]))

    # -- alerts

    def _look_at_everybody(self) -> None:
        """Who was on the list of a lost Redis, or of a guardian that ended, isn't forgotten."""
        self._to_check = dict.fromkeys(self._book.clients, False) | self._to_check

    async def _look_at_alerts(self, open_shards: Sequence[int]) -> None:
        """Of closed buckets nothing is told: they are half empty, or half full."""
        try:
            touched = await self._store.take_touched(open_shards, TOUCHED_PER_SHARD_MAX)
        except RetryLater:  # taken off the list, perhaps, and not heard of
            self._look_at_everybody()
            raise
        for client_id, refused in touched.items():
            self._to_check[client_id] = refused or self._to_check.get(client_id, False)
        is_open = set(open_shards)
        due = [client_id for client_id in self._to_check if shard_of(client_id) in is_open]
        for first in range(0, len(due), CLIENTS_PER_CALL):
            await self._check_alerts(due[first : first + CLIENTS_PER_CALL])

    async def _check_alerts(self, client_ids: Sequence[str]) -> None:
        now_ms = self._parts.clock_ms()
        answers = await self._store.run([(client_id, [["b"]]) for client_id in client_ids])
        alerts: list[CreditAlert] = []
        marks: list[tuple[str, Sequence[Op]]] = []
        for client_id, (answer,) in zip(client_ids, answers, strict=True):
            balance = parse_balance(answer)
            if not balance.open or balance.generation != self._known.number:
                continue  # closed meanwhile: when it opens, everybody is looked at
            due = self._alerts.due(client_id, balance, now_ms, refused=self._to_check[client_id])
            alerts += due
            marks += [(client_id, [["A", alert.level_percent, epoch_of(balance)]]) for alert in due]
        if alerts:
            await self._publish(alerts)
            with contextlib.suppress(RetryLater):  # for the eyes of operators; what counts is committed
                await self._store.run(marks)
        for client_id in client_ids:
            self._to_check.pop(client_id, None)

    async def _publish(self, alerts: Sequence[CreditAlert]) -> None:
        """The alerts, and that they were raised, in one transaction."""
        parts = self._parts
        await self._commit(
            [self._alerts.record_of(client_id) for client_id in {alert.client_id: None for alert in alerts}],
            [alert_output(alert, parts.alert_codec, parts.alert_partitions) for alert in alerts],
        )
        CREDIT_ALERTS_RAISED.inc(len(alerts))
        for alert in alerts:
            log.info(
                "credit alert",
                client=alert.client_id,
                level_percent=alert.level_percent,
                available_micro=alert.available_credits_micro,
            )

    def _show(self, states: Sequence[ShardState]) -> None:
        QUOTA_OPEN.set(sum(state.open for state in states) / SHARDS)
        clocks = [clock for clock in map(log_clock, states) if clock is not None]
        if len(clocks) == SHARDS:
            QUOTA_LOG_CLOCK_SECONDS.set(min(clocks) / 1000)


async def _call(what: Callable[[], Awaitable[None]]) -> None:
    await what()
