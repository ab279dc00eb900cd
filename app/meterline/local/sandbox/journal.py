"""The append-only file behind the sandbox: one JSON record a line, on disk before anybody hears of it.

Group commit: while one write is on its way to the disk, the records of other requests gather and go together
with the next. What was acknowledged survives SIGKILL and a power cut; a line that was being written then is
recognised at the next start (it has no end, or is no JSON) and dropped, because nobody was told of it.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from meterline.errors import UserError

__all__ = ["Journal"]


class Journal:
    """The open journal of one state directory; a second process is refused by a file lock.

    Args:
        directory: created if absent.
        on_broken: called, on the writing thread, when the disk refuses a write. What is in memory is then
            ahead of the disk and a failed fsync can't be repeated, so it must end the process.
    """

    def __init__(self, directory: Path, on_broken: Callable[[OSError], None]) -> None:
        self._path = directory / "journal.jsonl"
        self._on_broken = on_broken
        self._pending: list[bytes] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "sandbox-journal")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sync_directory(directory)
        except BlockingIOError:
            raise UserError(
                f"Another sandbox uses {directory}. Stop it, or give this one its own --state-dir."
            ) from None
        except OSError as error:
            raise UserError(f"The sandbox can't keep its state in {directory}: {error.strerror}.") from None

    def replay(self, take: Callable[[dict[str, Any]], None]) -> int:
        """Hand every record to `take`, oldest first; cut off a torn last line.

        Returns:
            Bytes dropped: 0 after a clean stop.

        Raises:
            UserError: a line before the last is damaged, which no crash of ours explains.
        """
        size = self._path.stat().st_size
        intact = 0
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                record = _parse(line)
                if record is None:
                    self._drop_tail(lines, intact, number)
                    break
                take(record)
                intact += len(line)
        return size - intact

    def append(self, record: dict[str, Any]) -> None:
        """Queue a record, in the order of calls; it is on disk when `flushed` returns."""
        self._pending.append(json.dumps(record, separators=(",", ":")).encode() + b"\n")

    async def flushed(self) -> None:
        """Return when everything appended so far is on disk."""
        if not self._pending and self._flusher is None:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        await waiter

    async def close(self) -> None:
        """Write what is queued and let go of the directory."""
        await self.flushed()
        self._thread.shutdown()
        os.close(self._file)

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiters:
            lines, self._pending = self._pending, []
            waiters, self._waiters = self._waiters, []
            if lines:
                await loop.run_in_executor(self._thread, self._write, b"".join(lines))
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        self._flusher = None

    def _write(self, data: bytes) -> None:
        try:
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[os.write(self._file, remaining) :]
            os.fdatasync(self._file)
        except OSError as error:
            self._on_broken(error)
            raise

    def _drop_tail(self, lines: IO[bytes], intact: int, number: int) -> None:
        if lines.read(1):
            raise UserError(
                f"Line {number} of {self._path} is damaged. Restore the file, or use another --state-dir."
            )
        os.ftruncate(self._file, intact)
        os.fsync(self._file)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _sync_directory(directory: Path) -> None:
    """Make the file's name as durable as its content."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
