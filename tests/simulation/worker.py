"""A simulated worker process: the real engine and owners, and what Faust does around them."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace

from tests.simulation.kafka_client import SimulatedLog
from tests.simulation.ledger import LedgerOfProcess
from tests.simulation.loop import VirtualLoop

from meterline.contracts.codec import RecordCodec
from meterline.contracts.topics import METERING_CHANGELOG, USAGE_EVENTS
from meterline.metering.owner import MeteringOwner, MeteringTools
from meterline.metering.worker import make_meter
from meterline.streaming.chunks import split_into_chunks
from meterline.streaming.consumer import CaughtUp
from meterline.streaming.engine import Engine, EngineLimits

CODECS = {
    name: RecordCodec(name)
    for name in ("usage-event", "usage-window", "usage-total", "usage-progress", "dead-letter")
}
LONG_POLL_S = 0.5
"""The broker holds an empty fetch so long."""
LIMITS = EngineLimits(flush_interval_s=0.25, pending_max=12, idle_after_s=1.0)
QUEUE_MAX = 3
"""Chunks that wait to be delivered; beyond, nothing is fetched."""
WINDOW_PARTITIONS = 2


def metering_tools(ledger, **more):
    """What an owner works with, on a ledger that is its writer and its reader."""
    return MeteringTools(
        writer=ledger,
        reader=ledger,
        events=CODECS["usage-event"],
        windows=CODECS["usage-window"],
        totals=CODECS["usage-total"],
        progress=CODECS["usage-progress"],
        dead_letters=CODECS["dead-letter"],
        **more,
    )


class Killed(BaseException):
    """This process ends here and now."""


class Worker:
    """One life of a process. `world.member(name)` is whoever lives under the name now.

    Attributes:
        is_alive: neither killed nor ended by itself.
        is_stopped: by SIGSTOP; goes on with what it believes when it is woken.
        ended: why it ended by itself, if it did.
    """

    def __init__(self, world, name):
        self.world, self.name = world, name
        self.program = world.program_of.get(name)
        self.loop = VirtualLoop(world.clock, self._surprise)
        self.is_alive, self.is_stopped = True, False
        self.silences = 0
        self._asleep = []
        self.ended = None
        self.engine = self._new_engine()
        self.kafka = self.engine._broker
        self._positions, self._run_ends, self._seen = {}, {}, {}
        self._queue = deque()
        self._arrived, self._may_fetch = asyncio.Event(), asyncio.Event()
        self._assignment = 0
        self._flows = False
        self.loop.create_task(self._fetch_forever())
        self.loop.create_task(self._deliver_forever())
        self._join_soon()

    def _new_engine(self):
        world = self.world
        ledger = LedgerOfProcess(world, self)
        tools = metering_tools(
            ledger,
            settings=world.settings_of.get(self.name, world.settings),
            window_partitions=WINDOW_PARTITIONS,
            make_meter=make_meter if self.program is None else self.program.make_meter,
            now_ms=world.wall_ms,
        )
        return Engine(
            group="metering",
            source_topic=USAGE_EVENTS,
            changelog=METERING_CHANGELOG,
            broker=SimulatedLog(world, self),
            limits=LIMITS,
            make_owner=lambda partition: MeteringOwner(partition, tools),
            before_fencing=ledger.wait_until_up,
            committed={},
            caught_up=self._caught_up,
            seek_soon=self._seek,
            now_ms=world.wall_ms,
        )

    # -- life and death

    @property
    def is_responsive(self):
        return self.is_alive and not self.is_stopped

    def kill(self):
        """SIGKILL: nothing of it runs any more."""
        if self.is_alive:
            self.is_alive = False
            self._fall_silent()

    def stop(self):
        """SIGSTOP."""
        if self.is_responsive:
            self.is_stopped = True
            self._fall_silent()

    def wake(self):
        """SIGCONT: it goes on where it was."""
        if self.is_alive and self.is_stopped:
            self.is_stopped = False
            self.silences += 1
            for sleeper in self._asleep:
                sleeper.set_result(None)
            self._asleep.clear()
            self.world.later(
                self.world.latency(), lambda: self.is_responsive and self.world.group.heard(self)
            )

    async def woken(self):
        """Wait until the process goes on; for ever, if it is dead."""
        self._asleep.append(self.loop.create_future())
        await self._asleep[-1]

    def leave(self):
        """SIGTERM: let go of everything, then leave the group, then end."""

        async def leave():
            self._pause()
            await self.engine.stop()
            self.world.group.leave(self)
            self.is_alive = False

        self.loop.create_task(leave())

    def _fall_silent(self):
        self.silences += 1
        self.world.group.silent(self)

    def _surprise(self, error):
        if not isinstance(error, Killed):
            self.world.surprises.append(error)

    # -- the group's side

    def _join_soon(self):
        self.world.later(self.world.latency(), lambda: self.is_responsive and self.world.group.join(self))

    def revoke(self):
        """The heartbeat says that partitions may be lost. Faust waits for this before it joins again."""

        async def revoke():
            self._pause()
            await self.engine.before_revoke()
            self._join_soon()

        self.loop.create_task(revoke())

    def receive(self, partitions):
        """The assignment: restore, seek, go on. A newer one doesn't wait for it, as in Faust."""
        self._assignment += 1
        number = self._assignment

        async def assigned():
            await self.engine.take_over(set(partitions))
            if number == self._assignment:
                self._positions = dict(self.engine.next_offsets())
                self._run_ends, self._seen = {}, {}
                self._queue.clear()
                self._flows = True
                self._may_fetch.set()
                self._arrived.set()

        self.loop.create_task(assigned())

    def _pause(self):
        self._assignment += 1
        self._flows = False

    # -- the consumer's side

    async def _fetch_forever(self):
        while True:
            while not self._flows or not self._positions or len(self._queue) > QUEUE_MAX:
                self._may_fetch.clear()
                await self._may_fetch.wait()
            number, positions = self._assignment, dict(self._positions)
            fetched = await self.kafka.fetch(USAGE_EVENTS, positions, self.world.fetch_max())
            if number != self._assignment or positions != self._positions:
                continue
            for partition, answer in fetched.items():
                self._take(partition, positions[partition], answer)
            if not any(answer.records for answer in fetched.values()):
                await self.world.news(self, LONG_POLL_S)

    def _take(self, partition, position, answer):
        if answer.records:
            # As CommittedChunksThread does it.
            first = min(self._run_ends.get(partition, position), answer.records[0].offset)
            self._queue.extend(split_into_chunks(first, answer.records))
            self._run_ends[partition] = answer.records[-1].offset + 1
            self._arrived.set()
        self._positions[partition] = answer.position
        self._seen[partition] = (answer, self.world.wall_ms())

    async def _deliver_forever(self):
        while True:
            while not self._queue or not self._flows:
                self._arrived.clear()
                await self._arrived.wait()
            chunk = self._queue.popleft()
            self._may_fetch.set()
            await self.engine.deliver(SimpleNamespace(value=chunk.value, ack=_nothing))

    def drop_chunk(self):
        """Faust forgets a chunk now and then: paused partition, cleared queue."""
        if self._queue:
            self._queue.popleft()

    def _caught_up(self, partition, delivered_until):
        if partition not in self._seen or not self._flows:
            return None
        answer, answered_at_ms = self._seen[partition]
        if self._run_ends.get(partition, delivered_until) > delivered_until:
            return None
        if not answer.position == answer.stable == answer.end:
            return None
        return CaughtUp(answer.position, answered_at_ms)

    def _seek(self, partition, offset):
        if partition in self._positions:
            self._positions[partition] = offset
            self._run_ends.pop(partition, None)
            self._seen.pop(partition, None)


def _nothing():
    """Group offsets are for displays."""
