"""Slots of the spool directory: one for each process that runs at a time, each under its own lock.

A process takes the lowest slot that is free, with whatever a killed one left there, and looks again and again
for others that nobody holds but where usage waits. The locks are the kernel's (flock): they end with their
process (a forked child that lives on keeps its parent's), and they need a local file system.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from meterline.errors import UserError
from meterline.task.errors import SpoolFailed
from meterline.task.segments import has_segments, sync_directory

__all__ = ["SLOTS_MAX", "Slot", "abandoned_slots", "take_slot"]

SLOTS_MAX = 1_000
"""Processes of one host that share a spool directory; more are a loop that starts processes without end."""


class Slot:
    """A slot this process holds, until `release`.

    Attributes:
        path: its directory.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def release(self) -> None:
        """Let another process have it. Again: does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def take_slot(root: Path) -> Slot:
    """The lowest slot that is free, made if there is none.

    Raises:
        UserError: too many processes, or no directory can be made here.
        SpoolFailed: the disk.
    """
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in range(SLOTS_MAX):
            path = root / f"slot-{number:03}"
            if not path.exists():
                path.mkdir(exist_ok=True, mode=0o700)
                sync_directory(root)
            slot = _lock(path)
            if slot is not None:
                return slot
    except PermissionError as error:
        raise UserError(
            f"the spool directory {root} can't be used: {error}. Set METERLINE_QUOTA__SPOOL_DIR to a local "
            "directory of this user."
        ) from None
    except OSError as error:
        raise SpoolFailed(f"the spool directory {root} can't be used: {error}") from error
    raise UserError(f"{SLOTS_MAX} processes use the spool directory {root} at this moment")


def abandoned_slots(root: Path) -> Iterator[Slot]:
    """Slots that nobody held, where something may wait: now held by this process."""
    for path in sorted(root.glob("slot-*")):
        if has_segments(path):
            slot = _lock(path)
            if slot is not None:
                if has_segments(path):
                    yield slot
                else:
                    slot.release()


def _lock(path: Path) -> Slot | None:
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:  # whatever it was: no lock stays held
        os.close(lock)
        raise
    return Slot(path, lock)
