"""When the partitions of a worker flush: together, so that their rows meet in one insert."""

import asyncio
from types import SimpleNamespace

import pytest
from tests.simulation.lone_process import LoneProcess

from meterline.streaming.engine import Engine, EngineLimits
from meterline.streaming.owner import PartitionOwner

INTERVAL_S = 0.15
PENDING_MAX = 100


class Owner(PartitionOwner):
    """Notes when its flushes begin; each takes as long as it is told."""

    def __init__(self):
        self.took_s, self.begun, self.records = 0.01, [], 0

    async def restore(self, *_):
        return 0

    def feed(self, records):
        self.records += len(records)

    @property
    def pending(self):
        return self.records

    async def flush(self):
        loop = asyncio.get_running_loop()
        self.begun.append(loop.time())
        taken = self.records
        await asyncio.sleep(self.took_s)
        self.records -= taken


class Scene(LoneProcess):
    """An engine that owns two partitions and has begun its first round, in time that goes on when told to."""

    def __init__(self):
        super().__init__()
        self.owners = {0: Owner(), 1: Owner()}
        self.engine = Engine(
            group="metering",
            source_topic="usage.events",
            changelog="state",
            broker=Broker(),
            limits=EngineLimits(INTERVAL_S, PENDING_MAX, idle_after_s=3_600),
            make_owner=self.owners.get,
            before_fencing=nothing,
            committed={},
            caught_up=lambda *_: None,
            seek_soon=lambda *_: None,
        )

    def go_on(self, seconds):
        self.world.advance(seconds)

    def deliver(self, partition, count):
        records = [SimpleNamespace(offset=offset) for offset in range(count)]
        chunk = SimpleNamespace(partition=partition, first_offset=0, offset=count - 1)
        event = SimpleNamespace(value=(chunk, records), ack=lambda: None)
        self.loop.create_task(self.engine.deliver(event))
        self.go_on(0)

    def begun(self, partition):
        return self.owners[partition].begun


class Broker:
    """Kafka, as far as an engine needs it that commits nothing."""

    async def read_ranges(self, _topic, partitions):
        return dict.fromkeys(partitions)

    async def read_state(self, *_):
        return {}

    def transactional_client(self, _):
        return SimpleNamespace(start=nothing, stop=nothing)

    def close(self):
        """Nothing is held."""


async def nothing():
    """There is nothing to wait for."""


@pytest.fixture
def scene():
    with Scene() as scene:
        scene.loop.create_task(scene.engine.take_over({0, 1}))
        scene.go_on(0)
        yield scene
        scene.run(scene.engine.stop())


def test_all_begin_together_each_interval(scene):
    scene.go_on(1.0)

    assert scene.begun(0) == scene.begun(1)
    assert scene.begun(0) == pytest.approx([INTERVAL_S * number for number in range(7)])


def test_the_next_round_begins_when_the_slowest_has_ended(scene):
    """Not at the next beat: two intervals would be one flush."""
    scene.owners[1].took_s = 1.2 * INTERVAL_S
    scene.go_on(1.0)

    assert scene.begun(0) == scene.begun(1)
    assert scene.begun(0)[1:] == pytest.approx([INTERVAL_S * (1 + 1.2 * number) for number in range(5)])


def test_who_waits_long_holds_the_others_up_for_one_interval(scene):
    scene.owners[1].took_s = 10.0
    scene.go_on(1.0)

    assert scene.begun(0)[1:] == pytest.approx([INTERVAL_S * (1 + 2 * number) for number in range(3)])
    assert len(scene.begun(1)) == 2


def test_who_comes_back_joins_the_others(scene):
    scene.owners[1].took_s = 1.0
    scene.go_on(0.5)
    scene.owners[1].took_s = 0.01
    scene.go_on(2.0)

    assert scene.begun(0)[-5:] == scene.begun(1)[-5:]


def test_much_that_is_pending_begins_a_round_at_once(scene):
    scene.go_on(0.02)
    scene.deliver(0, PENDING_MAX // 2)

    assert scene.begun(0)[-1] == scene.begun(1)[-1] == pytest.approx(0.02)


def test_a_partition_that_is_lost_amid_its_flush_holds_nobody_up(scene):
    scene.owners[1].took_s = 10.0
    scene.go_on(0.16)
    scene.loop.create_task(scene.engine.take_over({0}))
    scene.go_on(1.0)
    later = [at for at in scene.begun(0) if at > 0.2]

    assert later == pytest.approx([later[0] + INTERVAL_S * number for number in range(len(later))])
    assert len(later) >= 6
