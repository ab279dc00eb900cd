"""Faust's Kafka consumer, reading committed records in chunks and starting where the state says.

Faust decides who owns a partition. Where to read is ours: the restart point is the committed state, never the
group's committed offset, which follows for lag displays only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from aiokafka import conn
from faust.transport.drivers import aiokafka as driver

from meterline.streaming.chunks import split_into_chunks

__all__ = ["CaughtUp", "ChunkTransport", "Positions", "read_whole_answers"]

ANSWER_AGE_MS_MAX = 5_000
"""A position is worth something while answers to fetches come. Faust lets the broker hold an empty fetch for
1.5 s: below that a quiet, healthy partition would look stale, and its last windows would stay open."""

TRICKLE_WAIT_MS, TRICKLE_BYTES = 30, 128 * 1024
"""While records come in steadily, the broker holds an answer until it is so old or so large: each costs a
worker a millisecond and more for every partition, however few records it has. The broker and not we: what we
fetched early would grow old here, and what comes after it wait for the next one. A fifth of the usual flush
interval; and who is behind is never held up."""

STEADY_S = 2 * TRICKLE_WAIT_MS / 1000
"""Records come in steadily if there are some at least this often. Of a slower topic each record is told at
once, and between two of them nobody asks in vain."""

ANSWER_BYTES_AHEAD = 4 * 1024 * 1024
"""Of an answer that is taken from the socket before anybody reads it: twice the largest fetch."""


def read_whole_answers() -> None:
    """From now on a connection of aiokafka's takes in an answer to a fetch without a stop.

    With its own limit, 64 KiB, it stops and starts listening with each piece of the megabytes of an
    answer: a tenth of the time of a fast worker.
    """
    conn.READER_LIMIT = ANSWER_BYTES_AHEAD


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Nothing readable or still undecided lies behind this position."""

    position: int
    answered_at_ms: int
    """When the broker's newest answer came, by the worker's clock."""


class Positions(Protocol):
    """What the consumer asks of the engine that owns the partitions."""

    source_topic: str

    def next_offsets(self) -> Mapping[int, int]:
        """First offset not yet taken in, of each partition that is ready."""

    def applied_offset(self, partition: int) -> int | None:
        """Last offset the committed state accounts for; None when it is not known."""

    async def before_revoke(self) -> None:
        """Partitions may be lost soon: let open transactions end, begin no new one."""


class CommittedChunksThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread: read_committed, and whole fetches as chunks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run_ends: dict[Any, int] = {}
        self._noted: dict[Any, int] = {}
        """Positions up to which `_run_ends` tells what was handed out: a fetch moves the position first."""
        self._run_assignment: object = None
        self._is_steady = False
        self._fetched_at = 0.0

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        # Faust ties this to processing_guarantee="exactly_once", whose recovery never ends on a
        # transactional changelog. The fetcher reads the attribute later, in start().
        assert consumer._isolation_level == "read_uncommitted"
        consumer._isolation_level = "read_committed"
        self._quiet = consumer._fetch_max_wait_ms, consumer._fetch_min_bytes
        return consumer

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: Any,
        timeout: float | None = None,  # noqa: ASYNC109 - Faust's signature
        max_records: int | None = None,
    ) -> dict[Any, list[Any]]:
        assignment = self._current_assignment(consumer)
        before = self._known_positions(assignment, active_partitions)
        # That no more come is to be noticed soon: until then the broker is asked every 30 ms.
        patience_s = STEADY_S if self._is_steady else timeout
        fetched = await super()._fetch_records(consumer, active_partitions, patience_s, max_records)
        self._let_the_broker_gather(consumer._fetcher, is_some=bool(fetched))
        if self._current_assignment(consumer) is not self._run_assignment:
            self._run_assignment = self._current_assignment(consumer)
            self._run_ends.clear()
        chunks = {}
        for tp, records in fetched.items():
            # A run without a seek has no holes but control and aborted records; after a seek the position
            # it went to is the start. (`records` may be whole batches: then the first one may begin below.)
            first = self._run_ends.get(tp)
            if first is None:
                first = min(before.get(tp, records[0].offset), records[0].offset)
            chunks[tp] = list(split_into_chunks(first, records))
            self._run_ends[tp] = records[-1].offset + 1
        self._noted = self._known_positions(self._current_assignment(consumer), active_partitions)
        return chunks

    def _let_the_broker_gather(self, fetcher: Any, *, is_some: bool) -> None:
        """Say with the next fetch how long its answer may be held."""
        now = asyncio.get_running_loop().time()
        self._is_steady = is_some and now - self._fetched_at < STEADY_S
        if is_some:
            self._fetched_at = now
        fetcher._fetch_max_wait_ms, fetcher._fetch_min_bytes = (
            (TRICKLE_WAIT_MS, TRICKLE_BYTES) if self._is_steady else self._quiet
        )

    @staticmethod
    def _current_assignment(consumer: Any) -> Any:
        subscription = consumer._subscription.subscription
        return subscription.assignment if subscription is not None else None

    @staticmethod
    def _known_positions(assignment: Any, partitions: Any) -> dict[Any, int]:
        if assignment is None:
            return {}
        states = {tp: assignment.state_value(tp) for tp in partitions or ()}
        return {tp: state.position for tp, state in states.items() if state and state.has_valid_position}

    async def _seek_wait(self, consumer: Any, partitions: Mapping[Any, int]) -> None:
        for tp in partitions:
            self._run_ends.pop(tp, None)
        await super()._seek_wait(consumer, partitions)

    async def seek_to_committed(self) -> Any:
        """Seek as Faust wants it; the runs known so far end here."""
        self._run_ends.clear()
        return await super().seek_to_committed()

    def log_end(self, tp: Any) -> int | None:
        """The partition's high watermark as a fetch told it; where aiokafka would assert, None."""
        consumer = self._consumer
        assignment = self._current_assignment(consumer) if consumer is not None else None
        state = assignment.state_value(tp) if assignment is not None else None
        return cast("int | None", state.highwater) if state is not None else None

    def group_failure(self) -> Exception | None:
        """What ended this member's part in its group, if anything did.

        aiokafka hands it to whoever asks for records through its own methods, and waits for that; Faust asks
        the fetcher. The member would stay, and never get a partition again.
        """
        coordinator = getattr(self._consumer, "_coordinator", None)
        try:
            if coordinator is not None:
                coordinator.check_errors()
        except Exception as error:  # noqa: BLE001 - whatever it was
            return error
        return None

    def caught_up(self, tp: Any, delivered_until: int) -> CaughtUp | None:
        """Where the partition stands if everything was read and delivered; otherwise None.

        The last stable offset alone isn't enough: records of an open transaction may be older than any limit
        (measured: position == LSO < high watermark).
        """
        consumer = self._consumer
        assignment = self._current_assignment(consumer) if consumer is not None else None
        state = assignment.state_value(tp) if assignment is not None else None
        if state is None or not state.has_valid_position or state.timestamp is None:
            return None
        if time.time_ns() // 1_000_000 - state.timestamp > ANSWER_AGE_MS_MAX:
            return None
        position = cast(int, state.position)
        if self._noted.get(tp) != position or self._run_ends.get(tp, delivered_until) > delivered_until:
            return None  # a chunk is on its way
        return CaughtUp(position, state.timestamp) if position == state.lso == state.highwater else None


class ChunkConsumer(driver.Consumer):
    """Faust's consumer; the position in the source topic comes from the engine."""

    def _positions(self) -> Positions:
        app: Any = self.app
        return cast(Positions, app.positions)

    def _new_consumer_thread(self) -> CommittedChunksThread:
        return CommittedChunksThread(self, loop=self.loop, beacon=self.beacon)

    async def _add_gap(self, tp: Any, offset_from: int, offset_to: int) -> None:
        # Gaps are normal on a transactional topic, and Faust's interval tree goes quadratic on chunks.
        if tp.topic != self._positions().source_topic:
            await super()._add_gap(tp, offset_from, offset_to)

    def _new_offset(self, tp: Any) -> int | None:
        positions = self._positions()
        if tp.topic != positions.source_topic:
            return super()._new_offset(tp)
        self._acked[tp].clear()
        self._acked_index[tp].clear()
        applied = positions.applied_offset(tp.partition)
        committed = self._committed_offset[tp]
        if applied is None or (committed is not None and applied + 1 <= committed):
            return None
        return applied + 1

    async def perform_seek(self) -> None:
        """Seek to the group's offsets as Faust does, then to where the state says."""
        await super().perform_seek()
        positions = self._positions()
        next_offsets = positions.next_offsets()
        wanted = {
            tp: next_offsets[tp.partition]
            for tp in self.assignment()
            if tp.topic == positions.source_topic and tp.partition in next_offsets
        }
        if wanted:
            await self.seek_wait(wanted)
            self._read_offset.update({tp: offset or None for tp, offset in wanted.items()})

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Wait for nothing but open transactions: milliseconds."""
        await self._positions().before_revoke()
        await super().on_partitions_revoked(revoked)

    def caught_up(self, partition: int, delivered_until: int) -> CaughtUp | None:
        """See CommittedChunksThread; None as well when the partition isn't assigned."""
        for tp in self.assignment():
            if tp.topic == self._positions().source_topic and tp.partition == partition:
                thread = cast(CommittedChunksThread, self._thread)
                return thread.caught_up(tp, delivered_until)
        return None

    def group_failure(self) -> Exception | None:
        """See CommittedChunksThread."""
        return cast(CommittedChunksThread, self._thread).group_failure()

    def log_end(self, partition: int) -> int | None:
        """Offset the next record will get, as the broker's newest answer told; None: not known."""
        for tp in self.assignment():
            if tp.topic == self._positions().source_topic and tp.partition == partition:
                return cast(CommittedChunksThread, self._thread).log_end(tp)
        return None

    def seek_soon(self, partition: int, offset: int) -> asyncio.Task[None]:
        """Send the consumer back to an offset of the source topic."""
        tps = [tp for tp in self.assignment() if tp == (self._positions().source_topic, partition)]

        async def seek() -> None:
            await self.seek_wait(dict.fromkeys(tps, offset))
            self._read_offset.update(dict.fromkeys(tps, offset or None))

        return asyncio.get_running_loop().create_task(seek())


class ChunkTransport(driver.Transport):
    """Faust's transport with our consumer."""

    Consumer: ClassVar[type[ChunkConsumer]] = ChunkConsumer
