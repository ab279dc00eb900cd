"""The owner of one partition of usage.totals: the log's statements into the buckets, totals first.

    usage.totals -> newest total of each client -> buckets -> progress, once read to the end -> shards

Every assignment reads the partition from its first record: statements are true for ever, and a rebuild needs
them all. What is committed is only how far the partition has come.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import stamina

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import is_progress_key, progress_from_record, total_from_record
from meterline.domain.totals import UsageProgress, UsageTotal
from meterline.errors import DeadLetterError, PartitionHalted, RetryLater
from meterline.logs import get_logger
from meterline.metrics import QUOTA_TOTALS
from meterline.quota.keys import SHARDS, shard_of
from meterline.quota.shards import Op, Shards
from meterline.quota.state import Meta, meta_key
from meterline.streaming.owner import Commit, CommitFn, LogRange, Output, PartitionOwner, SourceRecord

__all__ = ["CommitState", "Companion", "QuotaOwner", "QuotaParts"]

CLIENTS_PER_CALL = 500
"""Buckets told in one round trip: a few milliseconds of the server's time."""
LOOK_INTERVAL_S = 1.0
"""How often an owner with nothing new looks whether a new generation wants its totals again; also how long it
leaves a Redis alone that is away."""
COMMIT_INTERVAL_S = 1.0
"""The place in the log is for displays: more often would only cost."""

log = get_logger(__name__)

Source = tuple[str, str]
"""Topic id of the source, client."""

CommitState = Callable[[Sequence[tuple[bytes, bytes]], Sequence[Output]], Awaitable[None]]
"""Commits further state and records in one transaction, as the fenced owner of the partition."""


class Companion(Protocol):
    """What runs beside an owner: the guardian, beside that of partition 0."""

    def start(self, state: Mapping[bytes, bytes], commit: CommitState) -> None:
        """Begin, with the partition's committed state."""

    def check(self) -> None:
        """Raise what it ended with, if it ended."""

    def close(self) -> None:
        """The partition is lost."""


@dataclass(frozen=True, slots=True)
class QuotaParts:
    """What the partitions of a worker share."""

    store: Shards
    totals: RecordCodec
    progress: RecordCodec
    source_topic_id: str
    """Kafka's id of usage.events."""
    make_companion: Callable[[int], Companion | None]
    clock_s: Callable[[], float] = time.monotonic


class QuotaOwner(PartitionOwner):
    """Brings the statements of one partition into the buckets."""

    def __init__(self, partition: int, parts: QuotaParts) -> None:
        self._partition = partition
        self._parts = parts
        self._companion = parts.make_companion(partition)
        self._state: Mapping[bytes, bytes] | None = None
        self._arrived: deque[SourceRecord] = deque()
        self._at_end = False
        self._totals: list[dict[Source, UsageTotal]] = [{} for _ in range(SHARDS)]
        """Of each shard the newest total of each client: what a new generation needs."""
        self._changed: list[set[Source]] = [set() for _ in range(SHARDS)]
        self._progress: dict[str, UsageProgress] = {}
        """The newest that was read, by topic id."""
        self._settled: dict[str, UsageProgress] = {}
        """The newest behind which no total is missing: read to the end after it."""
        self._told: list[int] = [0] * SHARDS
        """The generation of each shard that has all totals but the changed ones."""
        self._told_progress: dict[int, dict[str, UsageProgress]] = {}
        self._next_look_at = 0.0
        self._next_commit_at = 0.0
        self._is_away = False
        self._read_offset = -1
        self._meta: Meta
        self._commit: CommitFn
        self._turn = asyncio.Lock()

    # -- taking over

    async def restore(self, state: Mapping[bytes, bytes], log: LogRange, commit: CommitFn) -> int:
        """Begin at the partition's first record; see PartitionOwner."""
        self._commit, self._state = commit, state
        saved = state.get(meta_key(log.partition))
        meta = Meta(log.topic_id) if saved is None else Meta.from_bytes(saved)
        where = f"{log.topic}-{log.partition}"
        if meta.topic_id != log.topic_id:
            raise PartitionHalted(
                f"{where} was recreated: its topic id is {log.topic_id}, quota knows {meta.topic_id}. What "
                "clients have used would be forgotten. Restore the topic"
            )
        if meta.applied_offset >= log.end_offset:
            raise PartitionHalted(
                f"{where} ends at offset {log.end_offset - 1}, quota has applied {meta.applied_offset}: the "
                "log lost its end, and with it totals that clients were charged by. Restore it"
            )
        self._meta = meta
        await commit(Commit([(meta_key(log.partition), meta.to_bytes())], (), meta.applied_offset))
        return log.start_offset

    # -- taking in

    def feed(self, records: Iterable[SourceRecord]) -> None:
        """Take records in; they are decoded by the next flush, because a registry may have to be asked."""
        self._arrived.extend(records)

    @property
    def pending(self) -> int:
        """Records taken in and not yet understood."""
        return len(self._arrived)

    def on_read_to_end(self) -> None:
        """What has arrived by now is all there is: progress in it may be believed."""
        self._at_end = True

    # -- flush

    async def flush(self) -> None:
        """Tell the buckets what arrived, or, when a generation is new, everything."""
        self._run_companion()
        at_end, self._at_end = self._at_end, False
        batch = list(self._arrived)
        news = await self._understand(batch)
        for _ in batch:
            self._arrived.popleft()
        if at_end:
            news |= self._settle()
        if not news and self._parts.clock_s() < self._next_look_at:
            return
        self._next_look_at = self._parts.clock_s() + LOOK_INTERVAL_S
        try:
            await self._tell()
        except RetryLater as error:
            if not self._is_away:
                log.warning("waiting for Redis", partition=self._partition, error=str(error))
            self._is_away = True
            return
        self._is_away = False
        await self._commit_meta()

    def _run_companion(self) -> None:
        if self._companion is None:
            return
        if self._state is not None:
            # Not in `restore`: the engine lets the partition commit for good only after it.
            self._companion.start(self._state, self.commit_state)
            self._state = None
        self._companion.check()

    async def _understand(self, batch: Sequence[SourceRecord]) -> bool:
        """Keep the newest statements. True: something is new."""
        if not batch:
            return False
        news = False
        for statement in await self._decode(batch):
            if isinstance(statement, UsageTotal):
                news |= self._keep_total(statement)
            else:
                self._keep_progress(statement)
        self._read_offset = batch[-1].offset
        return news

    def _keep_total(self, total: UsageTotal) -> bool:
        shard, source = shard_of(total.client_id), (total.topic_id, total.client_id)
        known = self._totals[shard].get(source)
        if known is not None and total.cutoff_offset <= known.cutoff_offset:
            if total.cutoff_offset == known.cutoff_offset and total.sums != known.sums:
                self._alarm(total, "another total of the same cutoff is known")
            return False
        self._totals[shard][source] = total
        self._changed[shard].add(source)
        return True

    def _keep_progress(self, progress: UsageProgress) -> None:
        known = self._progress.get(progress.topic_id)
        if known is not None:
            progress = replace(
                progress,
                accounted_until=max(progress.accounted_until, known.accounted_until),
                published_until=max(progress.published_until, known.published_until),
            )
        self._progress[progress.topic_id] = progress

    def _settle(self) -> bool:
        """Everything up to the end is in memory: the progress read so far holds for it. True: it is new."""
        settled = dict(self._progress)
        topic_id = self._parts.source_topic_id
        # True without a record: of a log without statements nothing is accounted. It tells the guardian that
        # this partition was read.
        settled.setdefault(topic_id, UsageProgress(topic_id, self._partition, 0, -1))
        is_new = settled != self._settled
        self._settled = settled
        return is_new

    # -- telling the buckets

    async def _tell(self) -> None:
        """Totals first, then the progress: a bucket that believed the progress before would forget holds."""
        store = self._parts.store
        generations = {
            shard: state.generation for shard, state in enumerate(await store.states()) if state.generation
        }
        for shard, generation in generations.items():
            if self._told[shard] != generation:
                self._changed[shard].update(self._totals[shard])
                self._told_progress.pop(shard, None)
        settled = self._settled
        untold = [(shard, source) for shard in generations for source in self._changed[shard]]
        for first in range(0, len(untold), CLIENTS_PER_CALL):
            await self._tell_totals(untold[first : first + CLIENTS_PER_CALL])
        for shard, generation in generations.items():
            self._told[shard] = generation
        due = {s: g for s, g in generations.items() if self._told_progress.get(s) != settled}
        if not due or not settled:
            return
        # A shard that refuses is of a new generation meanwhile, which the next look sees.
        for shard in await store.progress(due, settled.values()):
            self._told_progress[shard] = settled

    async def _tell_totals(self, some: Sequence[tuple[int, Source]]) -> None:
        totals = [self._totals[shard][source] for shard, source in some]
        answers = await self._parts.store.run([(total.client_id, [_total_op(total)]) for total in totals])
        for (shard, source), total, (answer, *_) in zip(some, totals, answers, strict=True):
            # A newer one may have arrived while we waited; it stays.
            if self._totals[shard][source] is total:
                self._changed[shard].discard(source)
            if answer == "ok":
                QUOTA_TOTALS.labels("applied").inc()
            elif answer == "o":
                QUOTA_TOTALS.labels("older").inc()
            else:
                why = "its bucket knows another one of the same cutoff" if answer == "!" else answer
                self._alarm(total, why)

    def _alarm(self, total: UsageTotal, why: str) -> None:
        """Nothing is changed by it; somebody must look."""
        QUOTA_TOTALS.labels("refused").inc()
        log.error(
            "total refused",
            client=total.client_id,
            topic_id=total.topic_id,
            partition=total.partition,
            cutoff=total.cutoff_offset,
            credits_micro=total.sums.credits_micro,
            why=why,
        )

    # -- commit

    async def commit_state(self, changes: Sequence[tuple[bytes, bytes]], outputs: Sequence[Output]) -> None:
        """Commit state of the companion, and records with it."""
        async with self._turn:
            await self._commit(Commit(list(changes), outputs, self._meta.applied_offset))

    async def _commit_meta(self) -> None:
        now = self._parts.clock_s()
        if self._read_offset <= self._meta.applied_offset or now < self._next_commit_at:
            return
        self._next_commit_at = now + COMMIT_INTERVAL_S
        async with self._turn:
            meta = replace(self._meta, applied_offset=self._read_offset)
            await self._commit(
                Commit([(meta_key(self._partition), meta.to_bytes())], (), meta.applied_offset)
            )
            self._meta = meta

    # -- decoding

    async def _decode(self, batch: Sequence[SourceRecord]) -> list[UsageTotal | UsageProgress]:
        """In a thread: the codec may ask a schema registry, until it answers."""
        async for attempt in stamina.retry_context(on=RetryLater, attempts=None, timeout=None, wait_max=5.0):
            with attempt:
                return await asyncio.to_thread(
                    lambda: [self._statement(record) for record in batch if record.value is not None]
                )
        raise AssertionError("retries without a limit don't end")

    def _statement(self, record: SourceRecord) -> UsageTotal | UsageProgress:
        parts = self._parts
        try:
            if is_progress_key(record.key or b""):
                return progress_from_record(parts.progress.decode(record.value))
            return total_from_record(parts.totals.decode(record.value))
        except DeadLetterError as error:
            raise PartitionHalted(
                f"usage.totals-{self._partition} offset {record.offset} is no statement of ours: {error}"
            ) from error

    def close(self) -> None:
        """The partition is lost; see PartitionOwner."""
        if self._companion is not None:
            self._companion.close()


def _total_op(total: UsageTotal) -> Op:
    return ["T", total.topic_id, total.partition, total.cutoff_offset, total.sums.credits_micro]
