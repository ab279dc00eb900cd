"""`Admission`: whether the spool has room for the usage of one more task."""

from __future__ import annotations

import os
import time
from pathlib import Path

from meterline.task.errors import SpoolFull

__all__ = ["CLAIM_BYTES", "Admission"]

CLAIM_BYTES = 4 * 1024
"""Room kept for each running task: a dozen events without large attributes."""
NO_ROOM_AGAIN_S = 1.0
"""A full disk refuses new work so long; then the next task may find room."""


class Admission:
    """Counts the tasks that run. Not thread-safe: its owner locks.

    Args:
        slot: a directory on the spool's disk.
        bytes_max: limit for what waits and is claimed.
        disk_bytes_min: what must be free on the disk beside the claims.
    """

    def __init__(self, slot: Path, bytes_max: int, disk_bytes_min: int) -> None:
        self._slot, self._bytes_max, self._disk_bytes_min = slot, bytes_max, disk_bytes_min
        self._claims = 0
        self._no_room = ""
        self._no_room_until = 0.0
        """Why there was no room at the last try, and when it is worth another (monotonic seconds)."""

    def admit(self, waiting_bytes: int) -> None:
        """Claim room for one task.

        Raises:
            SpoolFull: the text says which limit; nothing was claimed.
        """
        claimed = (self._claims + 1) * CLAIM_BYTES
        if waiting_bytes + claimed > self._bytes_max:
            raise SpoolFull(
                f"{waiting_bytes} bytes of finished usage wait in {self._slot} for Kafka, and {self._claims} "
                f"tasks run: the limit of {self._bytes_max} bytes (METERLINE_QUOTA__SPOOL_BYTES_MAX) is "
                "reached. New work starts when Kafka takes some of it."
            )
        if time.monotonic() < self._no_room_until:
            raise SpoolFull(f"the disk of the spool {self._slot} is full: {self._no_room}")
        disk = os.statvfs(self._slot)
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes < self._disk_bytes_min + claimed:
            raise SpoolFull(
                f"the disk of the spool {self._slot} is nearly full: {free_bytes} bytes are left. New work "
                "starts when there is room."
            )
        self._claims += 1

    def release(self) -> None:
        """A task ended."""
        self._claims -= 1

    def no_room(self, reason: str) -> None:
        """A write found the disk full."""
        self._no_room = reason
        self._no_room_until = time.monotonic() + NO_ROOM_AGAIN_S

    def room_again(self) -> None:
        """A write found room."""
        self._no_room_until = 0.0
