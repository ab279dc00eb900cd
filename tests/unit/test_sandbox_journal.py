"""The sandbox's journal: order, durability before acknowledgement, torn and damaged lines."""

from __future__ import annotations

import asyncio
import os

import pytest

from meterline.errors import UserError
from meterline.local.sandbox.journal import Journal


def fail(error):
    raise AssertionError(error)


def records_of(directory):
    """Open, read everything, close."""

    async def read():
        journal = Journal(directory, fail)
        records = []
        dropped = journal.replay(records.append)
        await journal.close()
        return records, dropped

    return asyncio.run(read())


async def write(directory, *records):
    journal = Journal(directory, fail)
    journal.replay(lambda _: None)
    for record in records:
        journal.append(record)
    await journal.close()


def test_records_come_back_in_order(tmp_path):
    """Over several runs of the process too."""
    asyncio.run(write(tmp_path, {"n": 1}, {"n": 2}))
    asyncio.run(write(tmp_path, {"n": 3}))

    assert records_of(tmp_path) == ([{"n": 1}, {"n": 2}, {"n": 3}], 0)


def test_flushed_means_synced(tmp_path, monkeypatch):
    """A waiter returns only after a sync that began after its record was written; one sync serves many."""
    synced_sizes = []
    fdatasync = os.fdatasync

    def watch(descriptor):
        fdatasync(descriptor)
        synced_sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fdatasync", watch)

    async def run():
        journal = Journal(tmp_path, fail)
        written = 0

        async def one(number):
            nonlocal written
            journal.append({"n": number})
            written += len(f'{{"n":{number}}}\n')
            mine = written
            await journal.flushed()
            assert synced_sizes[-1] >= mine

        await asyncio.gather(*(one(number) for number in range(100)))
        await journal.close()

    asyncio.run(run())

    assert len(records_of(tmp_path)[0]) == 100
    assert len(synced_sizes) < 10


@pytest.mark.parametrize("tail", ['{"n":3', '{"n":3}', '{"n"\n', "\x00\x00\x00"])
def test_a_torn_last_line_is_dropped(tmp_path, tail):
    """No end or no JSON: nobody was told of it, and the next record starts on a line of its own."""
    asyncio.run(write(tmp_path, {"n": 1}, {"n": 2}))
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write(tail)

    assert records_of(tmp_path) == ([{"n": 1}, {"n": 2}], len(tail))
    asyncio.run(write(tmp_path, {"n": 4}))
    assert records_of(tmp_path) == ([{"n": 1}, {"n": 2}, {"n": 4}], 0)


def test_a_damaged_line_in_the_middle_stops_the_start(tmp_path):
    """It was acknowledged once; going on without it would be a quiet loss."""
    asyncio.run(write(tmp_path, {"n": 1}))
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('{"n":\n{"n":3}\n')

    with pytest.raises(UserError, match="Line 2"):
        records_of(tmp_path)


def test_two_processes_cannot_share_a_directory(tmp_path):
    """Interleaved journals would be nobody's truth."""

    async def run():
        first = Journal(tmp_path, fail)
        with pytest.raises(UserError, match="Another sandbox"):
            Journal(tmp_path, fail)
        await first.close()

    asyncio.run(run())


def test_a_refused_write_is_reported_and_acknowledged_to_nobody(tmp_path, monkeypatch):
    """The disk is full: the callback hears of it, the waiter never returns normally."""
    heard = []

    def full(descriptor, data):  # noqa: ARG001 - os.write's signature
        raise OSError(28, "No space left on device")

    async def run():
        journal = Journal(tmp_path, heard.append)
        monkeypatch.setattr(os, "write", full)
        journal.append({"n": 1})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(journal.flushed(), 0.5)

    asyncio.run(run())

    assert [error.errno for error in heard] == [28]
