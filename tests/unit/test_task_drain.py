"""The drainer: what is spooled reaches Kafka in order, whoever spooled it, whatever Kafka does meanwhile."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meterline.errors import RetryLater, WorkerMustExit
from meterline.producer import DeliveryFailed
from meterline.producer.events import build_event
from meterline.producer.usage import Acknowledged
from meterline.quota import Part, QuotaUnavailable
from meterline.quota.answers import PARTS_MAX
from meterline.task import drain as drain_module
from meterline.task.drain import Drainer
from meterline.task.errors import SpoolCorrupt
from meterline.task.holds import HeldReservations
from meterline.task.lanes import Published
from meterline.task.records import SpooledEvents
from meterline.task.segments import has_segments, segment_path
from meterline.task.settling import Settler
from meterline.task.slots import SLOTS_MAX, abandoned_slots, take_slot
from meterline.task.spool import Spool

MIB = 1024 * 1024
RECORDS = SpooledEvents()
LAST = True
"""Of its reservation."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(drain_module, "TICK_S", 0.01)
    monkeypatch.setattr(drain_module, "MARK_S", 0.02)
    monkeypatch.setattr(drain_module, "TRY_AGAIN_S", 0.02)
    monkeypatch.setattr(drain_module, "LOOK_FOR_SLOTS_S", 0.05)


class Kafka:
    """A log that answers as the test says: at once, later, or with a refusal."""

    def __init__(self):
        self.log = []
        self.waiting = []
        self.answers = True
        self.refuses = {}
        """Event id -> how often it is still given up."""
        self.raises = []
        """What the next calls of forward raise."""
        self.producers = 0

    def new_producer(self):
        self.producers += 1
        return self

    def forward(self, event, on_outcome):
        if self.raises and (error := self.raises.pop(0)) is not None:
            raise error
        self.waiting.append((event, on_outcome))
        if self.answers:
            self.answer()

    def answer(self):
        waiting, self.waiting = self.waiting, []
        for event, on_outcome in waiting:
            if self.refuses.get(event.event_id, 0) > 0:
                self.refuses[event.event_id] -= 1
                on_outcome(DeliveryFailed(((event.event_id, "refused"),)))
            else:
                self.log.append(event)
                on_outcome(Acknowledged(0, len(self.log) - 1))

    def close(self, _timeout_s=0.0):
        waiting, self.waiting = self.waiting, []
        for event, on_outcome in waiting:
            on_outcome(DeliveryFailed(((event.event_id, "purged"),)))

    @property
    def tasks(self):
        return [event.correlation_id for event in self.log]


class Process:
    """Spool and drainer of one process; `crash` is a kill, as far as files can tell."""

    def __init__(self, root, kafka, *, topic_id=lambda: "topic"):
        self.slot = take_slot(root)
        self.spool = Spool(self.slot.path, 4 * MIB)
        self.published, self.found = [], []
        self.drainer = Drainer(
            root,
            bytes_max=4 * MIB,
            new_producer=kafka.new_producer,
            topic_id=topic_id,
            on_published=self.published.extend,
            on_found=self.found.append,
        )
        self.drainer.start(self.spool)
        self.spool.start(self.drainer.wake)

    def keep(self, *numbers):
        records = [RECORDS.encode(event(number)) for number in numbers]
        records[-1] = RECORDS.closing(records[-1])
        self.spool.append(records).result(5)

    def close(self):
        self.drainer.stop()
        self.spool.close()
        self.slot.release()

    def crash(self, kafka):
        kafka.waiting.clear()
        self.drainer._mark = lambda: None
        self.spool.mark = lambda: None
        self.drainer.stop()
        self.slot.release()


def event(number):
    return build_event(
        client_id="acme",
        correlation_id=f"task-{number}",
        sku="gpu",
        credits=number,
        reservation_id=f"rid-{number}",
        now_ms=time.time_ns() // 1_000_000,
    )


def names(*numbers):
    return [f"task-{number}" for number in numbers]


def until(is_so, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_spooled_usage_is_published_in_order_and_told_with_its_place(tmp_path):
    """Topic, partition, offset; and which event is the last of its reservation."""
    kafka = Kafka()
    process = Process(tmp_path, kafka)
    process.keep(1, 2)
    process.keep(3)
    until(lambda: process.drainer.is_idle)
    process.close()

    assert kafka.tasks == names(1, 2, 3)
    assert [(told.event.correlation_id, *told[1:]) for told in process.published] == [
        ("task-1", False, "topic", 0, 0),
        ("task-2", True, "topic", 0, 1),
        ("task-3", True, "topic", 0, 2),
    ]
    assert not has_segments(process.slot.path)


def test_usage_waits_for_kafka_and_no_process_is_needed_meanwhile(tmp_path):
    """Killed before any acknowledgement; the next process publishes the same events, under the same ids."""
    kafka = Kafka()
    kafka.answers = False
    first = Process(tmp_path, kafka)
    first.keep(1)
    first.keep(2)
    until(lambda: len(kafka.waiting) == 2)
    first.crash(kafka)
    kafka.answers = True
    second = Process(tmp_path, kafka)
    second.keep(3)
    until(lambda: second.drainer.is_idle)
    second.close()

    assert kafka.tasks == names(1, 2, 3)
    assert [found.reservation_id for found in second.found] == ["rid-1", "rid-2"]
    assert not list(abandoned_slots(tmp_path))


def test_killed_between_acknowledgement_and_mark_it_is_published_again(tmp_path):
    """The second copy has the same id: metering counts it once."""
    kafka = Kafka()
    first = Process(tmp_path, kafka)
    first.drainer._mark = lambda: None
    first.keep(1)
    until(lambda: len(first.published) == 1)
    first.crash(kafka)
    second = Process(tmp_path, kafka)
    until(lambda: second.drainer.is_idle)
    second.close()

    assert kafka.tasks == names(1, 1)
    assert len({sent.event_id for sent in kafka.log}) == 1


def test_what_was_marked_is_not_published_again(tmp_path):
    """A restart after a quiet second begins where the former process stopped."""
    kafka = Kafka()
    first = Process(tmp_path, kafka)
    first.keep(1)
    until(lambda: first.spool._marked == first.spool._drained and first.drainer.is_idle)
    first.crash(kafka)
    second = Process(tmp_path, kafka)
    second.keep(2)
    until(lambda: second.drainer.is_idle)
    second.close()

    assert kafka.tasks == names(1, 2)


def test_processes_side_by_side_have_slots_of_their_own_and_a_dead_one_is_inherited(tmp_path):
    """By whichever looks first; the living ones keep theirs."""
    kafka, away = Kafka(), Kafka()
    away.answers = False
    survivor, victim = Process(tmp_path, kafka), Process(tmp_path, away)
    victim.keep(1)
    assert survivor.slot.path != victim.slot.path
    until(lambda: away.waiting)
    assert kafka.tasks == []
    victim.crash(away)
    until(lambda: kafka.tasks == names(1))
    until(lambda: not has_segments(victim.slot.path))
    survivor.close()

    assert [found.reservation_id for found in survivor.found] == ["rid-1"]


def test_a_refused_event_is_sent_until_it_is_taken(tmp_path):
    """Nothing is skipped, nothing is marked before it, and the others are not sent twice."""
    kafka = Kafka()
    kafka.refuses = {event(2).event_id: 3}
    process = Process(tmp_path, kafka)
    process.keep(1, 2, 3)
    until(lambda: process.drainer.is_idle)
    process.keep(4)
    until(lambda: process.drainer.is_idle)
    process.close()

    assert kafka.tasks == names(1, 3, 2, 4)


@pytest.mark.parametrize("error", [RetryLater("the registry is away"), WorkerMustExit("fenced")])
def test_a_producer_that_refuses_is_tried_again_or_replaced(tmp_path, error):
    """In order; after a fatal error with a new producer, and what the old one dropped is sent again."""
    kafka = Kafka()
    kafka.answers = False
    kafka.raises = [None, error]
    process = Process(tmp_path, kafka)
    process.keep(1, 2, 3)
    until(lambda: not kafka.raises)
    kafka.answers = True
    kafka.answer()
    until(lambda: process.drainer.is_idle)
    process.close()

    assert sorted(set(kafka.tasks)) == names(1, 2, 3)
    assert [task for task in kafka.tasks if task != "task-1"] == names(2, 3)
    assert kafka.producers == (2 if isinstance(error, WorkerMustExit) else 1)


def test_memory_stays_bounded_while_kafka_is_away(tmp_path, monkeypatch):
    """The rest waits in the files."""
    monkeypatch.setattr(drain_module, "WINDOW_EVENTS_MAX", 10)
    kafka = Kafka()
    kafka.answers = False
    process = Process(tmp_path, kafka)
    for number in range(50):
        process.keep(number)
    time.sleep(0.1)
    assert len(kafka.waiting) <= 10 + 50
    most = len(kafka.waiting)
    kafka.answers = True
    kafka.answer()
    until(lambda: process.drainer.is_idle)
    process.close()

    assert most < 50
    assert kafka.tasks == names(*range(50))


def test_without_the_topics_identity_nothing_is_settled_yet(tmp_path):
    """A part under a wrong name would stay provisional for ever."""
    kafka = Kafka()
    known = []
    process = Process(tmp_path, kafka, topic_id=lambda: known[0] if known else None)
    process.keep(1)
    until(lambda: kafka.log)
    time.sleep(0.05)
    assert process.published == []
    assert not process.drainer.is_idle
    known.append("topic")
    until(lambda: process.drainer.is_idle)
    process.close()

    assert [told.topic_id for told in process.published] == ["topic"]


def test_a_broken_spool_stops_its_own_process(tmp_path):
    """Nothing behind the broken place is published; whoever asks is told."""
    kafka = Kafka()
    kafka.answers = False
    process = Process(tmp_path, kafka)
    process.keep(1)
    until(lambda: kafka.waiting)
    real = process.spool.read

    def broken():
        raise SpoolCorrupt("changed")

    process.spool.read = broken
    process.keep(2)
    until(lambda: isinstance(process.drainer.failure, SpoolCorrupt))
    process.spool.read = real
    process.close()

    assert kafka.tasks == []


def test_a_broken_slot_left_behind_refuses_the_start_and_loses_nothing(tmp_path):
    """A person must look; a process that started would leave it for ever."""
    kafka = Kafka()
    kafka.answers = False
    victim = Process(tmp_path, kafka)
    victim.keep(1)
    victim.keep(2)
    path = segment_path(victim.slot.path, 1)
    victim.crash(kafka)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(SpoolCorrupt, match=path.name):
        Process(tmp_path, kafka)

    assert path.read_bytes() == content


def test_a_lock_ends_with_its_process(tmp_path):
    """Not with its files: a slot is free as soon as its process was killed."""
    script = (
        "import sys, pathlib, time; from meterline.task.slots import take_slot\n"
        "slot = take_slot(pathlib.Path(sys.argv[1])); print(slot.path.name, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            name = other.stdout.readline().strip()
            with take_slot(tmp_path) as mine:
                beside = mine.path.name
        finally:
            other.kill()
            other.wait()
    with take_slot(tmp_path) as inherited:
        again = inherited.path.name

    assert (name, beside, again) == ("slot-000", "slot-001", "slot-000")
    assert SLOTS_MAX == 1_000


class Buckets:
    """Hears settlements, once it does not refuse."""

    def __init__(self):
        self.settled = []
        self.refusals = 0

    async def settle(self, reservation_id, parts, *, final, client_id):
        if self.refusals:
            self.refusals -= 1
            raise QuotaUnavailable("away")
        self.settled.append((client_id, reservation_id, parts, final))

    async def renew(self, *_, **__):
        raise AssertionError("not in these tests")


def settled(published, refusals=0):
    """What the buckets hear, and the holds that are left of rid-1 and rid-2."""

    async def main():
        buckets = Buckets()
        buckets.refusals = refusals
        holds = HeldReservations(buckets, 60, 300)
        holds.add("rid-1", "acme")
        holds.add("rid-2", "acme")
        settler = Settler(buckets, holds)
        settler.add(published)
        while not await settler.settle_all():
            settler.add([])
        assert settler.is_idle
        return buckets.settled, sorted(holds._holds)

    return asyncio.run(main())


def test_parts_of_a_reservation_are_settled_together():
    """With their places; the hold is not renewed any more once it is final."""
    published = [Published(event(1), not LAST, "topic", 3, 7), Published(event(1), LAST, "topic", 3, 9)]

    assert settled(published) == (
        [("acme", "rid-1", [Part("topic", 3, 7, 1_000_000), Part("topic", 3, 9, 1_000_000)], True)],
        ["rid-2"],
    )


def test_a_settlement_is_told_until_it_is_heard():
    """Redis away: the hold is renewed until then, and nothing is told twice."""
    published = [Published(event(1), LAST, "topic", 0, 7)]

    assert settled(published, refusals=3) == (
        [("acme", "rid-1", [Part("topic", 0, 7, 1_000_000)], True)],
        ["rid-2"],
    )


def test_what_is_not_final_keeps_its_hold():
    """More is to come."""
    told, holds = settled([Published(event(1), not LAST, "topic", 0, 7)])

    assert [final for *_, final in told] == [False]
    assert holds == ["rid-1", "rid-2"]


def test_without_a_place_nothing_is_settled():
    """A hold given back before the log has charged it would be credits for free: it ends by the log's
    clock."""
    assert settled([Published(event(1), LAST, "topic", 0, -1)]) == ([], ["rid-2"])


def test_usage_that_is_not_billable_costs_no_credits():
    """Its part still ends the reservation."""
    published = [Published(event(1)._replace(billable=False), LAST, "topic", 0, 7)]

    assert settled(published)[0] == [("acme", "rid-1", [Part("topic", 0, 7, 0)], True)]


def test_usage_without_a_reservation_is_the_logs_affair():
    """Nothing to settle."""
    assert settled([Published(event(1)._replace(reservation_id=None), LAST, "topic", 0, 7)])[0] == []


def test_a_task_of_many_events_is_settled_in_several_calls():
    """A bucket takes so many parts at a time; only the last call is final."""
    count = 2 * PARTS_MAX + 1
    told, holds = settled([Published(event(1), n == count - 1, "topic", 0, n) for n in range(count)])

    assert [(len(parts), final) for _, _, parts, final in told] == [
        (PARTS_MAX, False),
        (PARTS_MAX, False),
        (1, True),
    ]
    assert holds == ["rid-2"]


class Disk:
    """Remembers what was synced; a power failure leaves nothing else of the spool's files."""

    def __init__(self, monkeypatch):
        self._synced = {}
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._syncing(getattr(os, name)))

    def _syncing(self, sync):
        def synced(file):
            sync(file)
            path = Path(f"/proc/self/fd/{file}").resolve()
            if path.is_file():
                self._synced[path.name.removesuffix(".new")] = path.read_bytes()

        return synced

    def lose_power(self, slot):
        for path in slot.iterdir():
            path.unlink()
            if path.name in self._synced:
                path.write_bytes(self._synced[path.name])


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")
def test_after_a_power_failure_the_log_has_the_credits_of_every_finished_task(tmp_path, monkeypatch):
    """Counted in credits, not in files."""
    disk, kafka = Disk(monkeypatch), Kafka()
    kafka.answers = False
    first = Process(tmp_path, kafka)
    for number in range(1, 21):
        first.keep(number)
    finished = sum(range(1, 21))
    first.crash(kafka)
    disk.lose_power(first.slot.path)
    kafka.answers = True
    second = Process(tmp_path, kafka)
    until(lambda: second.drainer.is_idle)
    second.close()

    assert sum(sent.credits_micro for sent in kafka.log) == finished * 1_000_000
