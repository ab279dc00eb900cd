"""What guards each credit between log, ledger and state: a worker dies at any write, the sums agree.

The real owner and the real engine; the log, the ledger, the changelog and the topics are a few dictionaries.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from tests.metering_world import OPTIONS, START, World

from meterline.domain.windows import SKUS_PER_WINDOW_MAX
from meterline.metering import owner as owner_module
from meterline.metering.owner import MeteringOwner
from meterline.streaming.chunks import split_into_chunks
from meterline.streaming.engine import Engine, EngineLimits
from meterline.streaming.owner import Commit, Output

CHANGELOG = "changelog"


def lives():
    """A world for each write at which the first worker may die; the second one works to the end."""
    undisturbed = World()
    undisturbed.append_some()
    undisturbed.work()
    for dies_at in range(1, undisturbed.writes + 1):
        world = World()
        world.append_some()
        world.dies_at = dies_at
        world.work()
        # Other flushes than before: what the dead one inserted and did not commit is cut anew.
        world.work(slice_length=4)
        yield dies_at, world


def test_a_crash_at_any_write_changes_no_credit():
    """Before or after the first meta record, an insert, a commit: ledger = windows = totals = the log."""
    wrong = {
        dies_at: (world.halted, world.books())
        for dies_at, world in lives()
        if world.books() != [world.owed()] * 3
    }

    assert wrong == {}


def test_a_crash_at_any_write_counts_every_record_once():
    """Accepted, duplicate or dead letter: each offset is one of them, in the committed counters."""
    wrong = {dies_at: world.counted() for dies_at, world in lives() if world.counted() != dict(world.fates)}

    assert wrong == {}


def test_no_progress_is_ahead_of_a_total():
    """When a reader sees it, the totals before it hold every credit up to its offset, in any crash."""
    too_early = {dies_at: world.too_early for dies_at, world in lives() if world.too_early}

    assert too_early == {}


def test_nothing_of_a_recreated_topic_is_counted_under_the_old_state():
    """Its first records would be skipped and the others billed under the old name: it counts none at all."""
    world = World()
    world.append_some()
    world.work()
    before = world.books()
    world.topic_id, world.log = "topic-2", []
    for _ in range(3):
        world.append_some()

    world.work()

    assert world.books() == before
    assert "re-created" in world.halted


def test_metrics_of_a_partition_are_there_as_long_as_it_is_ours():
    """After a rebalance two workers would tell of it, one of them for ever the same."""
    world = World()
    world.append("acme", 1)
    owner = MeteringOwner(0, world.tools())

    async def work():
        await owner.restore({}, world.range(), world.commit)
        owner.feed(world.log)
        await owner.flush()

    asyncio.run(work())
    world.now += 7_000

    assert age_of_watermark() == 7.0 + (START - owner._meter.watermark) / 1000
    assert REGISTRY.get_sample_value("meterline_dedupe_ids", {"partition": "0"}) == 1
    owner.close()
    assert age_of_watermark() is None


def age_of_watermark():
    return REGISTRY.get_sample_value("meterline_watermark_age_seconds", {"partition": "0"})


# -- traffic of odd shapes


def test_a_window_of_ten_thousand_skus_takes_what_a_record_can_hold():
    """4,000 are billed, the others are dead letters of one client, which stop nobody."""
    world = World()
    for number in range(10_000):
        world.append("acme", 3, ago=300 * len(world.log), sku=f"s{number}", fate=fate_of_sku(number))
        if number % 100 == 0:
            world.append("other", 5, ago=300 * len(world.log))

    world.work(slice_length=2_000)

    assert world.halted == ""
    assert world.counted() == {"duplicates": 0} | dict(world.fates)
    assert world.books() == [{"acme": 4_000 * 3, "other": 100 * 5}] * 3


def fate_of_sku(number):
    return "accepted" if number < SKUS_PER_WINDOW_MAX else "dead_letters"


def test_an_event_far_in_the_future_closes_no_window():
    """It is refused: those behind it are in time, and no snapshot is made of half a window."""
    world = World()
    world.append("acme", 1)
    world.append("acme", 1_000, ago=-(10**12), fate="dead_letters")
    world.append("acme", 1, ago=300)
    world.append("other", 1, ago=600)
    world.wall_at_rest = START  # nothing but events moves the watermark

    world.work(slice_length=1)

    assert world.windows == {}
    world.wall_at_rest = START + 10**6
    world.work()
    assert world.books() == [world.owed()] * 3


def test_a_client_with_half_of_all_usage_is_billed_like_the_others():
    """In every chunk, window and flush it is there, with as many events as all the rest."""
    world = World()
    for number in range(300):
        world.append("half", 7, ago=(number % 5) * 700)
        world.append(f"client-{number % 30}", 11, ago=(number % 7) * 500)

    world.work(slice_length=64)

    assert world.books() == [{"half": 300 * 7} | {f"client-{n}": 10 * 11 for n in range(30)}] * 3


@pytest.mark.parametrize("ahead", [1, -1], ids=["first ahead", "first behind"])
def test_clocks_of_two_workers_ten_minutes_apart_change_no_credit(ahead):
    """One closes windows by a clock that is ahead, the next one finds late what the log calls in time."""
    ten_minutes = 600_000
    world = World()
    world.append_some()
    world.now = world.wall_at_rest = START + ahead * ten_minutes
    world.work(slice_length=4)
    for number in range(40):
        world.append("acme", 100 + number, ago=(number % 9) * 400)
        world.append("other", 1, ago=(number % 4) * 900)
    world.now = world.wall_at_rest = START - ahead * ten_minutes
    world.work(slice_length=5)
    world.wall_at_rest = START + 10**6
    world.now = START + 10**6
    world.work()

    assert world.books() == [world.owed()] * 3
    assert world.counted() == dict(world.fates)


@pytest.mark.parametrize("ids_per_page", [500_000, 5], ids=["in one page", "in many pages"])
@pytest.mark.parametrize(("others", "fate"), [(199, "duplicates"), (200, "accepted")])
def test_a_rebuilt_index_ends_at_the_horizon_to_the_record(monkeypatch, ids_per_page, others, fate):
    """A restart, and then a copy exactly as old as the horizon (200 records of 300 ms), or one record older:
    charged once, or as a twin.
    """
    monkeypatch.setattr(owner_module, "SLICE_IDS_MAX", ids_per_page)
    world = World()
    world.options = OPTIONS.model_copy(update={"dedupe_horizon_ms": 200 * 300})
    world.append("acme", 1_000, "task")
    for _ in range(others):
        world.append("other", 1)
    world.work(slice_length=64)
    world.append("acme", 1_000, "task", fate=fate)

    world.work()

    assert world.books() == [{"acme": 1_000 * (1 + (fate == "accepted")), "other": others}] * 3


# -- the brake on dead letters

BRAKE_MAX, BRAKE_CLIENTS = 10, 5
BRAKED = OPTIONS.model_copy(update={"brake_dead_letters_max": BRAKE_MAX, "brake_clients_min": BRAKE_CLIENTS})


def flooded():
    """Usage, then a deployment whose records nobody can read: of 30 clients, one after the other."""
    world = World()
    world.options = BRAKED
    world.append_some()
    for number in range(90):
        world.append_poison(f"client-{number % 30}")
    world.append("acme", 17)
    return world


@pytest.mark.parametrize("slice_length", [1, 3, 40, 200])
def test_a_flood_of_dead_letters_stops_before_it_is_sent(slice_length):
    """The topic is not drained into the dead-letter topic; the records stay where they are, uncounted."""
    world = flooded()

    world.work(slice_length)

    assert len(world.dead_letters) <= BRAKE_MAX
    assert world.counted()["dead_letters"] == len(world.dead_letters)
    assert "are dead letters, of" in world.halted
    assert "BRAKE_DEAD_LETTERS_MAX" in world.halted


def test_restarts_do_not_drain_the_flood_little_by_little():
    """What was counted stands in the state: a supervisor that restarts for ever changes nothing."""
    world = flooded()
    world.work()
    sent, books = len(world.dead_letters), world.books()
    for _ in range(5):
        world.work()

        assert (len(world.dead_letters), world.books()) == (sent, books)
    assert world.halted


def test_after_the_brake_every_record_is_counted_once():
    """The operator lets them pass: nothing was lost by the stop, and nothing is counted again."""
    world = flooded()
    world.work()
    world.options = OPTIONS.model_copy(update={"brake_dead_letters_max": 1_000})

    world.work()

    assert world.counted() == dict(world.fates)
    assert world.books() == [world.owed()] * 3
    assert sorted(set(world.dead_letters)) == sorted(world.dead_letters)


def test_the_poison_of_a_few_clients_stops_nobody():
    """However much of it: each record costs one dead letter, and the others are billed."""
    world = World()
    world.options = BRAKED
    world.append_some()
    for number in range(300):
        world.append_poison(f"client-{number % (BRAKE_CLIENTS - 1)}")
        if number % 10 == 0:
            world.append("acme", 17)

    world.work(slice_length=50)

    assert world.halted == ""
    assert world.counted() == dict(world.fates)
    assert world.books() == [world.owed()] * 3


# -- the engine: where to read is what the state says


class Consumer:
    """Delivers to an engine from any offset, and goes where it is sent."""

    def __init__(self, world):
        self.world, self.position = world, 0
        self.table = {}
        self.table_at_the_end = None

    def seek(self, _, offset):
        self.position = offset

    def run(self, group_offset, end):
        """A worker's life: Faust starts it at the group's offset and delivers to the given end."""
        asyncio.run(self._run(group_offset, end))

    async def _run(self, group_offset, end):
        engine = Engine(
            group="metering",
            source_topic="usage.events",
            changelog=CHANGELOG,
            broker=FakeBroker(self.world),
            limits=EngineLimits(flush_interval_s=0.005, pending_max=10_000, idle_after_s=3_600),
            make_owner=lambda partition: MeteringOwner(partition, self.world.tools()),
            before_fencing=nothing,
            committed=self.table,
            caught_up=lambda *_: None,
            seek_soon=self.seek,
        )
        await engine.take_over({0})
        self.position = group_offset
        while self.position < end:
            records = self.world.log[self.position : min(self.position + 5, end)]
            (chunk,) = split_into_chunks(self.position, records)
            self.position += len(records)
            await engine.deliver(SimpleNamespace(value=chunk.value, ack=lambda: None))
        for _ in range(200):
            await asyncio.sleep(0.005)
            if engine.applied_offset(0) == end - 1:
                break
        self.table_at_the_end = {number: dict(state) for number, state in self.table.items()}
        await engine.stop()


class FakeBroker:
    """The world as the engine sees it; nobody else is there to be fenced."""

    def __init__(self, world):
        self.world = world

    async def read_ranges(self, *_):
        return {0: self.world.range()}

    async def read_state(self, *_):
        return dict(self.world.changelog)

    def transactional_client(self, _):
        return FakeClient(self.world)

    def close(self):
        """Nothing is held."""


class FakeClient:
    """One transaction at a time: what was sent becomes a commit of the world's."""

    def __init__(self, world):
        self.world = world

    async def start(self):
        """Nobody to fence."""

    async def stop(self):
        """Nothing is held."""

    async def begin_transaction(self):
        self.sent = []

    def create_batch(self):
        return FakeBatch()

    async def send_batch(self, batch, topic, *, partition):
        self.sent += [Output(topic, partition, key, value) for key, value in batch.records]
        return nothing()

    async def commit_transaction(self):
        state = [(sent.key, sent.value) for sent in self.sent if sent.topic == CHANGELOG]
        outputs = [sent for sent in self.sent if sent.topic != CHANGELOG]
        await self.world.commit(Commit(state, outputs, -1))


class FakeBatch:
    def __init__(self):
        self.records = []

    def append(self, *, key, value, **_):
        self.records.append((key, value))
        return True

    def close(self):
        """Nothing to pack."""


async def nothing():
    """Nobody to wait for."""


@pytest.mark.parametrize("group_offset", [0, 3, 6, 9, 12], ids="from {}".format)
def test_the_groups_offset_decides_nothing(group_offset):
    """Behind the state, equal to it or ahead of it: every record is counted, and once."""
    world = World()
    world.append_some()
    consumer = Consumer(world)
    consumer.run(0, 9)

    consumer.run(group_offset, len(world.log))

    assert dict(world.fates) == world.counted()
    assert world.owed() == world.books()[0]


def test_the_table_holds_what_is_committed():
    """Restored and changed with each commit; evicted windows are gone, and so is all when it is let go."""
    world = World()
    world.append_some()
    consumer = Consumer(world)

    for end in (9, len(world.log)):
        consumer.run(0, end)

        assert consumer.table_at_the_end == {0: world.changelog}
        assert consumer.table == {}
