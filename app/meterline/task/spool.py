"""`Spool`: finished usage in a local file, durable before the task is told so, in order, bounded."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from meterline import metrics
from meterline.task.admission import Admission
from meterline.task.errors import SpoolFailed, SpoolFull
from meterline.task.extents import Extents
from meterline.task.frames import FRAME_HEAD_BYTES, build_frame, pack
from meterline.task.segments import (
    Frame,
    Position,
    create_segment,
    frame_at,
    recover,
    segment_path,
    write_at,
    write_marker,
)

__all__ = ["APPEND_BYTES_MAX", "Spool"]

SEGMENT_BYTES_MAX = 8 * 1024 * 1024
"""Taken from the disk at once; drained segments are freed as a whole."""
SEGMENT_BYTES_MIN = 256 * 1024
GROUP_BYTES = 1024 * 1024
"""One fsync writes at most about this much: its tasks wait for all of it."""
APPEND_BYTES_MAX = 16 * 1024 * 1024
"""What one task may leave at once: a frame is read as a whole."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
NO_ROOM_S_MAX = 30.0
"""Finished work waits so long for room on a full disk: the drainer frees some as long as Kafka is there."""
NO_ROOM_PAUSE_S = 0.2

log = logging.getLogger("meterline.task")


class _Append(NamedTuple):
    payload: bytes
    durable: Future[None]


class Spool:
    """One slot of the spool directory. Thread-safe; whoever opens it holds the slot's lock (`slots.py`).

    Any thread appends; one thread writes what has come together in one frame and syncs it once. One reader
    (the drainer) takes the frames in order and says what is in Kafka.

    Args:
        slot: its directory.
        bytes_max: limit for what waits and is claimed.

    Raises:
        SpoolCorrupt: durable usage can't be read; nothing was deleted.
        SpoolFailed: the disk refuses.
    """

    def __init__(self, slot: Path, bytes_max: int) -> None:
        self.slot = slot
        self._segment_bytes = max(SEGMENT_BYTES_MIN, min(SEGMENT_BYTES_MAX, bytes_max // 8))
        self._on_durable: Callable[[], None] = lambda: None
        try:
            found = recover(slot)
        except OSError as error:
            raise SpoolFailed(f"the spool {slot} can't be opened: {error}") from error
        self._changed = threading.Condition()
        """Guards all below but the open file, which is the writing thread's."""
        self._extents = Extents(found.begins, found.ends, found.newest)
        self._drained = self._read = self._extents.onward(found.drained)
        self._waiting_bytes = 0
        self._set_waiting(self._extents.bytes_from(self._drained))
        self._admission = Admission(slot, bytes_max, 2 * self._segment_bytes)
        self._queue: deque[_Append] = deque()
        self._closing = False
        self._failure: Exception | None = None
        """Why nothing can be written any more."""
        self._marked = self._drained
        self._file = -1
        self._room = 0
        self._writer: threading.Thread | None = None

    @property
    def waiting_bytes(self) -> int:
        """On the disk and not known to be in Kafka; 0: all is drained."""
        with self._changed:
            return self._waiting_bytes

    def start(self, on_durable: Callable[[], None]) -> None:
        """Take room on the disk and begin to write.

        Args:
            on_durable: called from the writing thread when there is more to read.

        Raises:
            SpoolFull: the disk is full.
            SpoolFailed: it refuses.
        """
        try:
            self._roll(0)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise SpoolFull(f"no room for the spool {self.slot}: {error.strerror}") from error
            raise SpoolFailed(f"the spool {self.slot} can't be written: {error}") from error
        self._on_durable = on_durable
        self._writer = threading.Thread(target=self._write, name="meterline-spool", daemon=True)
        self._writer.start()

    def admit(self) -> None:
        """Keep room for one task that begins. Every admission ends with `release`.

        Raises:
            SpoolFull: the spool's limit, or the disk; nothing was kept.
            SpoolFailed: the disk refused the last writes; a restart reads what is durable.
        """
        with self._changed:
            if self._failure is not None or self._closing:
                raise SpoolFailed(f"the spool {self.slot} takes nothing: {self._failure or 'it is closed'}")
            try:
                self._admission.admit(self._waiting_bytes)
            except SpoolFull:
                metrics.SPOOL_REFUSED.inc()
                raise

    def release(self) -> None:
        """The task ended, whatever became of it."""
        with self._changed:
            self._admission.release()

    def append(self, records: Sequence[bytes]) -> Future[None]:
        """Keep records, all of them or none. They stay in order with what was appended before.

        Returns:
            Done when they are durable. It ends with `SpoolFailed` when the disk doesn't take them; a full
            one is tried for NO_ROOM_S_MAX. Cancelling it doesn't take them back.

        Raises:
            ValueError: more than APPEND_BYTES_MAX.
        """
        payload = pack(records)
        if len(payload) > APPEND_BYTES_MAX:
            raise ValueError(f"{len(payload)} bytes at once; the limit is {APPEND_BYTES_MAX}")
        durable: Future[None] = Future()
        with self._changed:
            if self._failure is not None or self._closing:
                durable.set_exception(_lost(self._failure or SpoolFailed("the spool is closed")))
            else:
                self._queue.append(_Append(payload, durable))
                self._changed.notify_all()
        return durable

    def read(self) -> Frame | None:
        """The next durable frame that was not yet read since the spool was opened; None: no more now.

        Raises:
            SpoolCorrupt: it has changed on the disk.
        """
        with self._changed:
            place = self._extents.onward(max(self._read, self._drained))
            if place >= self._extents.last():
                return None
        frame = frame_at(self.slot, place)
        self._read = frame.end  # only the reader moves it
        return frame

    def rewind(self) -> None:
        """Read again from the first frame that is not drained."""
        with self._changed:
            self._read = self._drained

    def drained(self, place: Position) -> None:
        """Everything before this place is in Kafka."""
        with self._changed:
            assert self._drained <= place <= self._extents.last()
            self._drained = self._extents.onward(place)
            self._set_waiting(self._extents.bytes_from(self._drained))

    def mark(self) -> None:
        """Make durable what `drained` said, and free the segments that are done with.

        Raises:
            OSError: not made durable; whatever was drained is published again after a restart.
        """
        with self._changed:
            place = self._drained
            done = self._extents.before(place.segment)
        if place != self._marked:
            write_marker(self.slot, place)
            self._marked = place
        for segment in done:
            segment_path(self.slot, segment).unlink(missing_ok=True)
        with self._changed:
            for segment in done:
                self._extents.remove(segment)

    def close(self) -> None:
        """Write what was appended, and stop. A spool that is drained leaves no segment."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join()
        metrics.SPOOL_WAITING_BYTES.dec(self._waiting_bytes)  # whoever opens it next tells of the rest
        try:
            if self._file >= 0:
                self._seal()
            self.mark()
        except OSError as error:
            log.warning("what is drained of %s is not marked; it is published again: %s", self.slot, error)
            return
        if not self._waiting_bytes:
            segment_path(self.slot, self._drained.segment).unlink(missing_ok=True)

    def _set_waiting(self, size: int) -> None:
        metrics.SPOOL_WAITING_BYTES.inc(size - self._waiting_bytes)  # a process may drain several spools
        self._waiting_bytes = size

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                group = [self._queue.popleft()]
                size = len(group[0].payload)
                while self._queue and size + len(self._queue[0].payload) <= GROUP_BYTES:
                    group.append(self._queue.popleft())
                    size += len(group[-1].payload)
            failure = self._write_group(b"".join(append.payload for append in group))
            for append in group:
                if append.durable.set_running_or_notify_cancel():
                    if failure is None:
                        append.durable.set_result(None)
                    else:
                        append.durable.set_exception(_lost(failure))
            if failure is None:
                self._on_durable()

    def _write_group(self, payload: bytes) -> Exception | None:
        """Make a frame durable; why it could not be."""
        deadline = time.monotonic() + NO_ROOM_S_MAX
        while True:
            try:
                self._write_frame(payload)
            except OSError as error:
                failure = self._give_back(error)
                if failure is not None:
                    return failure
                if time.monotonic() >= deadline or self._closing:
                    return error
                time.sleep(NO_ROOM_PAUSE_S)
            except Exception as error:  # noqa: BLE001 - told to each task that waits, and to all that follow
                self._fail(error)
                return error
            else:
                return None

    def _write_frame(self, payload: bytes) -> None:
        size = FRAME_HEAD_BYTES + len(payload)
        number, offset = self._extents.last()
        if self._file < 0 or offset + size > self._room:
            self._roll(size)
            number, offset = self._extents.last()
        write_at(self._file, build_frame(number, offset, payload), offset)
        os.fdatasync(self._file)  # its room was taken before: the length doesn't change
        with self._changed:
            self._extents.grow(number, size)
            self._set_waiting(self._waiting_bytes + size)
            self._admission.room_again()

    def _roll(self, size: int) -> None:
        """End the segment and begin the next one."""
        if self._file >= 0:
            self._seal()
        number = self._extents.newest + 1
        room = max(self._segment_bytes, size + SEGMENT_BYTES_MIN)
        self._file, begin = create_segment(self.slot, number, self._extents.last(), room)
        self._room = room
        with self._changed:
            is_first = not self._extents
            self._extents.add(number, begin)
            self._drained = self._extents.onward(Position(number, 0) if is_first else self._drained)

    def _seal(self) -> None:
        """Cut the open segment behind its last durable frame: what follows was never told to anybody."""
        os.ftruncate(self._file, self._extents.last().offset)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1

    def _give_back(self, error: OSError) -> Exception | None:
        """After a failed write: no frame may follow in this segment.

        Returns:
            Why nothing can follow in another one either, or None.
        """
        try:
            if self._file >= 0:
                self._seal()
        except OSError as second:
            self._fail(second)
            return second
        if error.errno not in NO_ROOM:
            self._fail(error)
            return error
        with self._changed:
            self._admission.no_room(error.strerror or str(error))
        return None

    def _fail(self, error: Exception) -> None:
        log.error("the spool %s can't be written any more: %s", self.slot, error)
        with self._changed:
            self._failure = error
            left, self._queue = list(self._queue), deque()
        for append in left:
            if append.durable.set_running_or_notify_cancel():
                append.durable.set_exception(_lost(error))


def _lost(error: Exception) -> SpoolFailed:
    return SpoolFailed(
        f"the usage of this task is not durable: {error}. Run the task again: the same usage has the same "
        "ids."
    )
