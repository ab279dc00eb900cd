"""What guards each credit between a task and the log: in power failures, re-runs, and on a broken disk."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future

import pytest

from meterline.domain.events import UsageEvent
from meterline.quota import FakeCreditBuckets
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
