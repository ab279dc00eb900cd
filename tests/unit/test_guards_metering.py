"""What guards each credit between log, ledger and state: a worker dies at any write, the sums agree.

The real owner and the real engine; the log, the ledger, the changelog and the topics are a few dictionaries.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from prometheus_client import REGISTRY

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_to_record
from meterline.domain.events import UsageEvent
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SKUS_PER_WINDOW_MAX, SkuTotal
from meterline.errors import PartitionHalted
from meterline.metering import owner as owner_module
from meterline.metering.owner import MeteringOwner, MeteringTools
from meterline.metering.state import Meta, meta_key
from meterline.metering.worker import make_meter
from meterline.settings import MeteringSettings
from meterline.streaming.chunks import split_into_chunks
from meterline.streaming.engine import Engine, EngineLimits
from meterline.streaming.owner import Commit, LogRange, Output

LENGTH, START = 1_000, 1_700_000_000_000
OPTIONS = MeteringSettings(
    window_length_ms=LENGTH,
    allowed_lateness_ms=0,
    keep_closed_windows_ms=2_000,
    late_snapshot_interval_ms=500,
)
CODECS = {
    name: RecordCodec(name)
    for name in ("usage-event", "usage-window", "usage-total", "usage-progress", "dead-letter")
}
CHANGELOG = "changelog"
TOTAL_KEY = b"17:meterline.total.1,"


class Record(NamedTuple):
    offset: int
    timestamp: int
    value: bytes
    key: bytes = b""
    headers: tuple = ()
    topic: str = "usage.events"
    partition: int = 0
    timestamp_type: int = 1


class Crash(BaseException):
    """The worker is killed at a write."""


class World:
    """One partition: its log, what is durable, and what the clients owe."""

    def __init__(self):
        self.now = START
        self.topic_id, self.log, self.accepted = "topic", [], {}
        self.fates = Counter()
        self.changelog, self.rows = {}, {}
        self.windows, self.totals, self.too_early = {}, {}, []
        self.dead_letters = []
        self.writes, self.dies_at, self.halted = 0, None, ""
        self.options = OPTIONS
        self.wall_at_rest = START + 10**6

    # -- the log

    def append(self, client, credits_micro, event_id=None, *, ago=0, sku="gpu", fate="accepted"):
        """A record, and what must become of it."""
        offset = len(self.log)
        timestamp = START + 300 * offset
        event = UsageEvent(event_id or f"e{offset}", client, "task", sku, credits_micro, timestamp - ago)
        self.log.append(Record(offset, timestamp, CODECS["usage-event"].encode(event_to_record(event))))
        self.fates[fate] += 1
        if fate == "accepted":
            self.accepted[offset] = (client, credits_micro)

    def append_poison(self, client):
        """No event: only its key tells whose it is."""
        offset = len(self.log)
        self.log.append(Record(offset, START + 300 * offset, b"poison", client.encode()))
        self.fates["dead_letters"] += 1

    def append_some(self):
        for number in range(6):
            self.append("acme", 1_000 + number)
            self.append("other", 10 + number, ago=400)
        self.append("acme", 1_002, "e4", fate="duplicates")
        self.append("acme", 9_999, "e4", fate="dead_letters")
        self.append("acme", 7, ago=2_500)
        self.append("other", 3, ago=3_900)
        self.append("acme", 1_000, "e0", ago=5_000, fate="duplicates")
        self.append("acme", 11, ago=1_300)  # its window is published a moment ago, and kept
        self.append("other", 13, ago=1_300)
        self.append("other", 5)

    def owed(self, until=2**63):
        """What each client has used up to an offset: the log alone says it."""
        owed = Counter()
        for offset, (client, credits_micro) in self.accepted.items():
            if offset <= until:
                owed[client] += credits_micro
        return dict(owed)

    # -- what is durable

    def write(self):
        """Before and after each write: the places to die."""
        self.writes += 1
        if self.writes == self.dies_at:
            raise Crash

    async def insert(self, _, columns, data, block):
        assert block is None, "the plain meter makes none"
        self.write()
        for row in zip(*data, strict=True):
            named = dict(zip(columns, row, strict=True))
            self.rows[named["topic_id"], named["offset"]] = named
        self.write()

    async def commit(self, what):
        self.write()
        for key, value in what.changelog:
            if value is None:
                self.changelog.pop(key, None)
            else:
                self.changelog[key] = value
        for output in what.outputs:
            self._publish(output)
        self.write()

    def _publish(self, output):
        if output.topic == "usage.windows":
            said = CODECS["usage-window"].decode(output.value)
            window = said["client_id"], said["window_start"]
            credits_micro = sum(sku["credits_micro"] for sku in said["skus"])
            self.windows[window] = max(
                self.windows.get(window, (-1, 0)), (said["cutoff_offset"], credits_micro)
            )
        elif output.topic == "usage.totals" and output.key.startswith(TOTAL_KEY):
            said = CODECS["usage-total"].decode(output.value)
            self.totals[said["client_id"]] = said["credits_micro"]
        elif output.topic == "usage.events.dlq":
            self.dead_letters.append(CODECS["dead-letter"].decode(output.value)["offset"])
        elif output.topic == "usage.totals":
            until = CODECS["usage-progress"].decode(output.value)["published_until"]
            if self.totals != self.owed(until):
                self.too_early.append((until, dict(self.totals), self.owed(until)))

    # -- the ledger, asked

    async def ask(self, question, *args):
        return getattr(self, question.__name__)(*args)

    def _rows(self, topic_id, until):
        return [row for (topic, offset), row in self.rows.items() if topic == topic_id and offset <= until]

    def partition_offsets(self, topic_id, _):
        offsets = [offset for topic, offset in self.rows if topic == topic_id]
        return (len(offsets), min(offsets), max(offsets)) if offsets else None

    def dedupe_rows(self, topic_id, _, until, since, before):
        rows = [row for row in self._rows(topic_id, until) if since <= row["appended_at"] < before]
        names = ("identity_hash", "payload_digest", "appended_at")
        return tuple([row[name] for row in rows] for name in names)

    def kept_windows(self, topic_id, _, until, since, lengths):
        sums = defaultdict(SkuTotal)
        for row in self._rows(topic_id, until):
            if row["occurred_at"] >= since:
                total = sums[lengths.start_of(row["occurred_at"]), row["client_id"], row["sku"]]
                total.count += 1
                total.credits_micro += row["credits_micro"]
        return dict(sums)

    def window_sums(self, windows):
        return [self._window_sum(ref, cutoff) for ref, cutoff in windows]

    def _window_sum(self, ref, cutoff):
        kept = self.kept_windows(ref.topic_id, 0, cutoff, ref.start, WindowLengths.of(LENGTH))
        wanted = (ref.start, ref.client_id)
        return {sku: total for (start, client, sku), total in kept.items() if (start, client) == wanted}

    # -- the worker

    def tools(self):
        return MeteringTools(
            settings=self.options,
            writer=self,
            reader=self,
            events=CODECS["usage-event"],
            windows=CODECS["usage-window"],
            totals=CODECS["usage-total"],
            progress=CODECS["usage-progress"],
            dead_letters=CODECS["dead-letter"],
            window_partitions=1,
            make_meter=make_meter,
            now_ms=lambda: self.now,
        )

    def range(self):
        return LogRange("cluster", "usage.events", self.topic_id, 0, 0, len(self.log))

    async def _work(self, slice_length):
        owner = MeteringOwner(0, self.tools())
        position = await owner.restore(dict(self.changelog), self.range(), self.commit)
        while records := self.log[position : position + slice_length]:
            owner.feed(records)
            position += len(records)
            self.now += 400
            await owner.flush()
        owner.on_caught_up(START + 10**6)
        owner.on_idle(self.wall_at_rest)
        for _ in range(3):
            self.now += 5_000
            await owner.flush()

    def work(self, slice_length=3):
        """One worker's life, to the end of the log or to its death."""
        self.halted = ""
        try:
            asyncio.run(self._work(slice_length))
        except Crash:
            pass
        except PartitionHalted as stop:
            self.halted = str(stop)

    def books(self):
        """Credits by client: as the ledger's rows, the newest snapshots and the newest totals say."""
        rows, windows = Counter(), Counter()
        for row in self.rows.values():
            rows[row["client_id"]] += row["credits_micro"]
        for (client, _), (_, credits_micro) in self.windows.items():
            windows[client] += credits_micro
        return [dict(rows), dict(windows), self.totals]

    def counted(self):
        """What became of the offsets, as the committed counters say."""
        counters = Meta.from_bytes(self.changelog[meta_key(0)]).counters
        return {name: getattr(counters, name) for name in ("accepted", "duplicates", "dead_letters")}


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


@pytest.mark.parametrize("rows_at_once", [500_000, 5], ids=["in one part", "in many parts"])
@pytest.mark.parametrize(("others", "fate"), [(199, "duplicates"), (200, "accepted")])
def test_a_rebuilt_index_ends_at_the_horizon_to_the_record(monkeypatch, rows_at_once, others, fate):
    """A restart, and then a copy exactly as old as the horizon (200 records of 300 ms), or one record older:
    charged once, or as a twin.
    """
    monkeypatch.setattr(owner_module, "INDEX_ROWS_AT_ONCE", rows_at_once)
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
            apply_committed=lambda *_: None,
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
