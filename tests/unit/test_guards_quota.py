"""What guards each credit between a task and the log: power failures, re-runs, a broken disk, leases."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future

import pytest

from meterline.domain.buckets import Bucket, Shard
from meterline.domain.events import UsageEvent
from meterline.quota import FakeCreditBuckets, LeasePlan, operations
from meterline.quota.leases import Leases
from meterline.quota.reservations import Reservations
from meterline.task.desk import Desk
from meterline.task.errors import SpoolFailed
from meterline.task.fake import FakeMeter
from meterline.task.holds import HeldReservations
from meterline.task.meter import Meter
from meterline.task.records import SpooledEvents
from meterline.task.spool import Spool

JOB = {"client_id": "acme", "sku": "gpu", "credits": 5, "correlation_id": "job-1"}
RECORDS = SpooledEvents()


class Disk:
    """What a power failure leaves of a folder: bytes that were synced, under names that were synced."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.synced, self.named = folder, {}, set()
        self._real = {name: getattr(os, name) for name in ("fsync", "fdatasync")}
        for name in self._real:
            monkeypatch.setattr(os, name, lambda file, name=name: self._sync(name, file))

    def _sync(self, name, file):
        self._real[name](file)
        found = os.fstat(file).st_ino
        if found == self.folder.stat().st_ino:
            self.named = {path.name for path in self.folder.iterdir()}
        for path in self.folder.iterdir():
            if path.stat().st_ino == found:
                self.synced[path.name] = path.read_bytes()

    def lose_power(self):
        for path in list(self.folder.iterdir()):
            if path.name in self.named:
                path.write_bytes(self.synced.get(path.name, b""))
            else:
                path.unlink()


def usage(number, credits_micro):
    event = UsageEvent(f"e{number}", "acme", f"task-{number}", "gpu", credits_micro, 1_700_000_000_000)
    return RECORDS.encode(event)


def credits_left(slot):
    """In micro-credits, what the next process finds."""
    spool = Spool(slot, 2**20)
    spool.start(lambda: None)
    total = 0
    while (frame := spool.read()) is not None:
        total += sum(RECORDS.decode(record).event.credits_micro for record in frame.records)
    spool.close()
    return total


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_a_power_failure_loses_no_credit_of_a_task_that_ended(tmp_path, monkeypatch, tasks):
    """What a task was told to be durable is on the disk, and under a name that is on the disk."""
    slot = tmp_path / "slot-000"
    slot.mkdir()
    disk = Disk(slot, monkeypatch)
    spool = Spool(slot, 2**20)
    spool.start(lambda: None)
    told = 0
    for number in range(tasks):
        spool.append([usage(number, 1_000 + number)]).result(5)
        told += 1_000 + number
    os.close(spool._file)  # its process is gone with the power
    spool._file = -1

    disk.lose_power()

    assert credits_left(slot) == told


async def reserved(buckets):
    """Whole credits that are set aside."""
    return int((await buckets.balance("acme")).reserved)


def test_two_attempts_at_one_task_hold_credits_each():
    """The second doesn't work on the first one's credits, and the first one's end takes none from it."""

    async def main():
        buckets, seen = FakeCreditBuckets({"acme": 100}), []
        async with FakeMeter(buckets) as meter:
            first, second = meter.task(**JOB), meter.task(**JOB)
            await first.__aenter__()
            await second.__aenter__()
            seen.append(await reserved(buckets))
            error = ZeroDivisionError()
            await first.__aexit__(type(error), error, None)
            seen.append(await reserved(buckets))
            await second.__aexit__(None, None, None)
            seen.append(await reserved(buckets))
            return seen

    assert asyncio.run(main()) == [10, 5, 0]


class BrokenSpool:
    """Nobody knows what reached the disk."""

    def admit(self):
        """There is room."""

    def release(self):
        """One less."""

    def append(self, _):
        durable = Future()
        durable.set_exception(SpoolFailed("the disk is broken"))
        return durable


def test_credits_of_usage_that_may_be_durable_stay_reserved():
    """It may be published yet: given back, they would be spent twice. The log's clock ends the hold."""

    async def main():
        buckets = FakeCreditBuckets({"acme": 100})
        desk = Desk(buckets, BrokenSpool(), HeldReservations(buckets, 60, 60), ttl_s=60)
        with pytest.raises(SpoolFailed):
            async with Meter(desk, lambda: True).task(**JOB):
                pass
        await desk.end()
        return await reserved(buckets)

    assert asyncio.run(main()) == 5


class Line:
    """What carries a lease's statements to its bucket; one may be stopped on its way."""

    def __init__(self, credits_micro):
        shard = Shard()
        shard.begin(1, partitions=1, topic_id="topic", skew_ms=0)
        shard.open_up(1)
        self.bucket = Bucket(shard)
        self.bucket.grant("grant", credits_micro)
        self.stated, self.on_its_way, self.held = 0, False, None
        self.arrives = asyncio.Event()
        self.arrives.set()

    def submit(self, _, op):
        return asyncio.ensure_future(self._carry(operations.as_array(op)))

    async def _carry(self, op):
        stopped = op[0] == "l" and not self.arrives.is_set()
        if stopped:
            self.on_its_way = True
            await self.arrives.wait()
        answer = self.bucket.apply(op, 1_000_000)
        if stopped:
            self.held = self.bucket.records[op[1]].hold
            self.others_take(self.bucket.available)
        self.stated += op[0] == "l"
        return answer.encode()

    def others_take(self, credits_micro):
        """Another process reserves them."""
        rid = f"others/{len(self.bucket.records)}"
        assert self.bucket.reserve(rid, credits_micro, 60_000, 1_000_000).startswith("g ")


async def until(is_so):
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 - several objects change
            await asyncio.sleep(0.001)


def test_q7_credits_on_their_way_back_are_not_decided_from():
    """The others may have them a moment later: what this process reserved must be held for it."""
    micro = 1_000_000

    async def main():
        line = Line(10_000 * micro)
        plan = LeasePlan(calls_per_s=10, share_max=0.1, ttl_s=10, interval_ms=1)
        leases = Leases(line.submit, plan, Reservations())
        leases.note("acme", micro, 100)
        await until(lambda: "acme" in leases.active)
        lease = leases.active["acme"]
        await until(lambda: lease._waker is not None)
        line.others_take(line.bucket.available - 100 * micro)
        stated = line.stated
        lease.wake()
        await until(lambda: line.stated > stated and lease._waker is not None)
        had = lease.free
        line.arrives.clear()
        lease.wake()
        await until(lambda: line.on_its_way)
        reserved = 0
        while lease.take(f"task/{reserved}", micro, 5.0) is not None:
            reserved += 1
        line.arrives.set()
        await until(lambda: line.held is not None)
        leases.is_closing = True
        return had // micro, reserved, line.held // micro

    had, reserved, held = asyncio.run(main())

    assert 0 < reserved <= held < had
