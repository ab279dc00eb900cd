"""The engine: which partitions are ours, what they take in, when they flush, how they commit."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from meterline.errors import PartitionHalted, RetryLater
from meterline.logs import get_logger
from meterline.metrics import COMMITS, LAG_OFFSETS, PARTITION_HALTED, PENDING_EVENTS
from meterline.streaming.batches import BatchedRecords
from meterline.streaming.broker_log import BrokerLog
from meterline.streaming.clock import wall_clock_ms
from meterline.streaming.consumer import CaughtUp
from meterline.streaming.fatal import die
from meterline.streaming.owner import Commit, LogRange, PartitionOwner
from meterline.streaming.steps import Step, reached
from meterline.streaming.transactions import FencedProducer, transactional_id_of

__all__ = ["Engine", "EngineLimits"]

T = TypeVar("T")

OPEN_TRANSACTION_WAIT_S = 20.0
"""Longer than the transaction timeout: if a commit takes longer, the broker has given it up and so do we."""

RETRY_PAUSE_S = 0.5

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """When to flush, when to stop taking in, when to call a partition idle."""

    flush_interval_s: float
    pending_max: int
    idle_after_s: float


@dataclass(eq=False, slots=True)
class OwnedPartition:
    """A partition that is ours until somebody else fences us."""

    number: int
    owner: PartitionOwner
    producer: FencedProducer
    state: dict[bytes, bytes] = field(default_factory=dict)
    """What is committed."""
    next_offset: int = -1
    applied_offset: int | None = None
    unacknowledged: deque[tuple[int, Any]] = field(default_factory=deque)
    commit_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: flush, now or as soon as the flush that runs has ended."""
    rests: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: no flush runs."""
    flushing: asyncio.Task[None] | None = None
    caught_up: CaughtUp | None = None
    """As of the last look; None as soon as something is delivered."""
    quiet_since: float = 0.0


class Engine:
    """Owns partitions of one source topic on behalf of one Faust app.

    Faust tells it which partitions to have (`take_over`), hands it chunks (`deliver`) and asks where to read
    (`next_offsets`). A partition is fenced, restored, fed, flushed and dropped here.
    """

    def __init__(
        self,
        *,
        group: str,
        source_topic: str,
        changelog: str,
        broker: BrokerLog,
        limits: EngineLimits,
        make_owner: Callable[[int], PartitionOwner],
        before_fencing: Callable[[], Awaitable[None]],
        committed: dict[int, dict[bytes, bytes]],
        caught_up: Callable[[int, int], CaughtUp | None],
        seek_soon: Callable[[int, int], object],
        log_end: Callable[[int], int | None] = lambda _: None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self.source_topic = source_topic
        self.partitions: dict[int, OwnedPartition] = {}
        self.halted: dict[int, str] = {}
        self.wanted: set[int] = set()
        self._group = group
        self._changelog = changelog
        self._broker = broker
        self._limits = limits
        self._make_owner = make_owner
        self._before_fencing = before_fencing
        self._committed = committed
        self._caught_up = caught_up
        self._seek_soon = seek_soon
        self._log_end = log_end
        self._now_ms = now_ms
        self._gate = asyncio.Event()
        self._gate.set()
        self._open_transactions = 0
        self._space = asyncio.Event()
        self._much_pending = asyncio.Event()
        self._rounds: asyncio.Task[None] | None = None
        self._taking_over = asyncio.Lock()
        self._assignment_number = 0

    # -- what the consumer asks (streaming.consumer.Positions)

    def next_offsets(self) -> Mapping[int, int]:
        """First offset not yet taken in, of each partition that is ready."""
        return {number: held.next_offset for number, held in self.partitions.items()}

    def applied_offset(self, partition: int) -> int | None:
        """Last offset the committed state accounts for; None when it is not known."""
        held = self.partitions.get(partition)
        return held.applied_offset if held is not None else None

    async def before_revoke(self) -> None:
        """Close the gate in front of new transactions and wait for the open ones: milliseconds.

        Nothing is dropped here: which partitions are lost is known at the assignment. An insert that runs is
        none of our business either: what it writes is harmless without a commit.
        """
        self._gate.clear()
        deadline = _loop_time() + OPEN_TRANSACTION_WAIT_S
        while self._open_transactions:
            if _loop_time() > deadline:
                die("a transaction did not end before a rebalance")
            await asyncio.sleep(0.002)

    # -- assignment

    async def take_over(self, wanted: set[int]) -> None:
        """Own exactly these partitions. Faust awaits this before it delivers.

        An exception here must end the process: Faust would swallow it and deliver records without state.
        """
        try:
            await self._take_over(wanted)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - see above
            die("partitions could not be restored", error)

    async def _take_over(self, wanted: set[int]) -> None:
        self._assignment_number += 1
        number = self._assignment_number
        self.wanted = set(wanted)
        for lost in [p for p in self.partitions if p not in wanted]:
            await self._drop(self.partitions.pop(lost))
        for lost in self.halted.keys() - wanted:
            PARTITION_HALTED.remove(lost)  # its next owner says how it stands
        self.halted = {p: why for p, why in self.halted.items() if p in wanted}
        self._gate.set()
        self._space.set()
        # Faust starts the restore of the next assignment while this one still waits: one at a time, and the
        # newest wins, or two of ours would fence each other.
        async with self._taking_over:
            if number != self._assignment_number:
                return
            new = sorted(p for p in wanted if p not in self.partitions and p not in self.halted)
            if new:
                await self._restore_all(new, number)
        log.info("partitions assigned", topic=self.source_topic, partitions=sorted(wanted), new=new)

    async def _restore_all(self, new: list[int], number: int) -> None:
        """Fence, then read: otherwise an earlier owner could go on behind what was read."""
        await self._before_fencing()
        if number != self._assignment_number:
            return
        fenced = await asyncio.gather(*(self._fence(p) for p in new))
        await asyncio.gather(*map(self._read_state, fenced))
        # Last: whoever else counts on meanwhile, the log holds what the state that was read accounts for.
        ranges = await self._patiently(self._broker.read_ranges, self.source_topic, new)
        where = [ranges[held.number] for held in fenced]
        restored = await asyncio.gather(*map(self._restore, fenced, where))
        for held in restored:
            if held is None:
                continue
            if held.number not in self.wanted:  # lost meanwhile
                await self._drop(held)
                continue
            self.partitions[held.number] = held
            held.flushing = asyncio.create_task(self._flush_forever(held))
        if self._rounds is None:
            self._rounds = asyncio.create_task(self._call_rounds())

    async def _fence(self, partition: int) -> OwnedPartition:
        """From here on no earlier owner commits anything."""
        client = self._broker.transactional_client(
            transactional_id_of(self._group, self.source_topic, partition)
        )
        producer = FencedProducer(client, self._changelog, partition)
        await producer.start()
        reached(Step.OWNER_FENCED)
        return OwnedPartition(partition, self._make_owner(partition), producer)

    async def _read_state(self, held: OwnedPartition) -> None:
        held.state = await self._patiently(self._broker.read_state, self._changelog, held.number)
        self._committed[held.number] = held.state
        reached(Step.STATE_READ)

    async def _restore(self, held: OwnedPartition, where: LogRange) -> OwnedPartition | None:

        async def commit(what: Commit) -> None:
            await self._commit(held, what)

        try:
            held.next_offset = await held.owner.restore(held.state, where, commit)
        except PartitionHalted as stop:
            if held.state != await self._patiently(self._broker.read_state, self._changelog, held.number):
                # We were stalled, and another owner has gone on: our verdict mixes two moments.
                die(f"partition {held.number} has another owner", stop)
            await self._halt(held, stop)
            return None
        held.applied_offset = held.next_offset - 1
        reached(Step.STATE_RESTORED)
        return held

    async def _patiently(self, call: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Ask until the other side answers."""
        while True:
            try:
                return await call(*args)
            except RetryLater as error:
                log.warning("waiting for Kafka", error=str(error))
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _drop(self, held: OwnedPartition) -> None:
        """Forget a partition that is no longer ours; what isn't committed is somebody else's to redo."""
        if self._committed.get(held.number) is held.state:
            del self._committed[held.number]
        if held.flushing is not None and held.flushing is not asyncio.current_task():
            held.flushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await held.flushing
        held.owner.close()
        held.unacknowledged.clear()
        LAG_OFFSETS.remove(held.number)
        await held.producer.stop()
        log.info("partition dropped", partition=held.number, uncommitted=held.owner.pending)

    async def _halt(self, held: OwnedPartition, stop: PartitionHalted) -> None:
        self.halted[held.number] = str(stop)
        PARTITION_HALTED.labels(held.number).set(1)
        log.error("partition halted", partition=held.number, why=str(stop))
        self.partitions.pop(held.number, None)
        self._space.set()  # what it held is nobody's any more: who waited for room of it goes on
        await self._drop(held)

    # -- delivery

    async def deliver(self, event: Any) -> None:
        """Take in one chunk; wait while too much is pending."""
        chunk, records = event.value
        held = self.partitions.get(chunk.partition)
        if held is None or chunk.offset < held.next_offset:
            event.ack()  # halted, lost, or delivered twice: nothing new
            return
        if chunk.first_offset > held.next_offset:
            # Faust dropped a chunk (paused partition, cleared queue): read it again from where we are.
            event.ack()
            log.warning(
                "chunk out of order", partition=held.number, at=held.next_offset, got=chunk.first_offset
            )
            self._seek_soon(held.number, held.next_offset)
            return
        if isinstance(records, BatchedRecords):
            records = records.since(held.next_offset)
        elif records[0].offset < held.next_offset:
            records = [record for record in records if record.offset >= held.next_offset]
        held.owner.feed(records)
        held.next_offset = chunk.offset + 1
        held.unacknowledged.append((chunk.offset, event))
        held.caught_up = None
        await asyncio.sleep(0)
        await self._wait_for_space()

    async def _wait_for_space(self) -> None:
        while (pending := self._pending()) >= self._limits.pending_max // 2:
            self._much_pending.set()
            if pending < self._limits.pending_max:
                return
            self._space.clear()
            await self._space.wait()

    def _pending(self) -> int:
        pending = sum(held.owner.pending for held in self.partitions.values())
        PENDING_EVENTS.set(pending)
        return pending

    # -- flush and commit

    async def _call_rounds(self) -> None:
        """Let all partitions flush at the same time, so that their rows meet in one insert.

        The next round begins when the interval is over or much is pending, and all have ended the one before:
        who came too late for a fixed beat would miss a whole one. A flush that takes longer (it may wait for
        another service) holds the others up for one interval; its partition joins a later round.
        """
        interval = self._limits.flush_interval_s
        while True:
            for held in self.partitions.values():
                held.turn.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._much_pending.wait(), interval)
            self._much_pending.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    for held in list(self.partitions.values()):
                        await held.rests.wait()

    async def _flush_forever(self, held: OwnedPartition) -> None:
        try:
            while True:
                held.rests.set()
                await held.turn.wait()
                held.turn.clear()
                held.rests.clear()
                self._notice_quiet(held)
                await held.owner.flush()
                self._show_lag(held)
                self._space.set()
        except asyncio.CancelledError:
            raise
        except PartitionHalted as stop:
            await self._halt(held, stop)
        except BaseException as error:  # noqa: BLE001 - any other end of a flush leaves its outcome unknown
            die(f"flush of partition {held.number} failed", error)

    def _show_lag(self, held: OwnedPartition) -> None:
        end = self._log_end(held.number)
        if end is not None and held.applied_offset is not None:
            LAG_OFFSETS.labels(held.number).set(max(0, end - 1 - held.applied_offset))

    def _notice_quiet(self, held: OwnedPartition) -> None:
        """Tell the owner up to which time it has everything, and when nothing came for a while."""
        before = held.caught_up
        now = held.caught_up = self._caught_up(held.number, held.next_offset)
        if now is not None:
            held.owner.on_read_to_end()
        # Two looks, apart: an answer to a fetch that was sent after the first look makes its time certain.
        if before is None or now is None or before.position != now.position:
            held.quiet_since = _loop_time()
            return
        if now.answered_at_ms > before.answered_at_ms:
            # The newer answer is to a fetch that was sent after the older one came: what the broker had
            # appended by then is in it. Its own time says less: it may have waited for this process.
            held.owner.on_caught_up(before.answered_at_ms - 1)
        if held.owner.pending:
            held.quiet_since = _loop_time()
        elif _loop_time() - held.quiet_since >= self._limits.idle_after_s:
            held.owner.on_idle(self._now_ms())

    async def _commit(self, held: OwnedPartition, what: Commit) -> None:
        async with held.commit_turn:
            await self._gate.wait()
            if held.applied_offset is not None and self.partitions.get(held.number) is not held:
                raise asyncio.CancelledError
            self._open_transactions += 1
            try:
                await held.producer.transact(what)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # noqa: BLE001 - whatever it is, the outcome is unknown
                die(f"transaction of partition {held.number} failed", error)
            finally:
                self._open_transactions -= 1
            COMMITS.inc()
            _apply(what.changelog, held.state)
            if held.applied_offset is not None:
                held.applied_offset = what.applied_offset
            while held.unacknowledged and held.unacknowledged[0][0] <= what.applied_offset:
                held.unacknowledged.popleft()[1].ack()
            reached(Step.COMMIT_APPLIED)

    # -- health and end

    def problems(self) -> list[str]:
        """Why this worker isn't ready; empty when it is."""
        found = [f"partition {p} halted: {why}" for p, why in sorted(self.halted.items())]
        if not self._assignment_number:
            found.append("no assignment of partitions yet")
        missing = self.wanted - self.partitions.keys() - self.halted.keys()
        if missing:
            found.append(f"partitions {sorted(missing)} are being restored")
        return found

    async def stop(self) -> None:
        """Let open transactions end, drop everything else."""
        await self.before_revoke()
        if self._rounds is not None:
            self._rounds.cancel()
        for held in list(self.partitions.values()):
            del self.partitions[held.number]
            await self._drop(held)
        self._broker.close()


def _apply(changes: Iterable[tuple[bytes, bytes | None]], state: dict[bytes, bytes]) -> None:
    # Whole dicts at a time: thousands of keys change with each commit.
    newest = dict(changes)
    gone = [key for key, value in newest.items() if value is None]
    state.update(cast("dict[bytes, bytes]", newest))
    for key in gone:
        del state[key]


def _loop_time() -> float:
    return asyncio.get_running_loop().time()
