"""The sandbox's clock as the workers of the proof see it: a page of memory that says what the sandbox said.

Time stands between two moves. Months pass in minutes, so the mover waits for workers that have a request
under way, or that have not looked at the clock for `BEHIND_MS`: no real worker would still have in hand what
Stripe answered hours ago.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

from tests.sandbox_account import SandboxClient
from tests.worker_nursery import NurseryWorker

from meterline.billing import worker as billing_worker
from meterline.billing.outcomes import Outcome
from meterline.billing.send import StripeSender
from meterline.domain.usage_records import UsageRecord
from meterline.settings import Settings
from meterline.streaming.app import WorkerApp

__all__ = ["ClockedWorker", "Mover", "VirtualClock"]

PLACE = struct.Struct("<q")
NEVER_LOOKED = 2**62
"""In a worker's place: it has just begun, and knows no time yet."""
SLOTS = 2
NOW, SEEN, UNDER_WAY = 0, 1, 1 + SLOTS
"""Places: the time; what each worker saw last; how many requests each has under way."""
BEHIND_MS = 2 * 3_600_000
"""A summary is believed six hours after the last request: what was asked two hours ago is far from that."""
LOOKS_S_MAX = 1.0
"""A worker without partitions never looks. One that stands still for six such hours is fenced by then."""
UNDER_WAY_S_MAX = 5.0
"""No request begins later than this after the commit of its attempt, so none is late by more than a move."""


class Page:
    """Numbers that whoever opens it shares: see the places above."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(PLACE.size * (1 + 2 * SLOTS)))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, place: int) -> int:
        return PLACE.unpack_from(self._memory, place * PLACE.size)[0]

    def __setitem__(self, place: int, value: int) -> None:
        PLACE.pack_into(self._memory, place * PLACE.size, value)


class VirtualClock:
    """What a billing worker knows of time; see `billing.clock.Clock`."""

    def __init__(self, path: Path, slot: int) -> None:
        self._page, self._seen = Page(path), SEEN + slot
        self._heard_ms = 0

    def now_ms(self) -> int:
        self._page[self._seen] = now_ms = max(self._page[NOW], self._heard_ms)
        return now_ms

    def boot_s(self) -> float:
        return time.monotonic()

    def heard(self, date: str) -> None:
        self._heard_ms = max(self._heard_ms, int(parsedate_to_datetime(date).timestamp() * 1000))


class Mover:
    """Moves the sandbox's time, and tells the workers."""

    def __init__(self, sandbox: SandboxClient, path: Path, workers: Sequence[ClockedWorker]) -> None:
        self._sandbox, self._page, self._workers = sandbox, Page(path), workers
        self.waited_s = 0.0

    @property
    def now_ms(self) -> int:
        return self._page[NOW]

    def move_to(self, moment_ms: int) -> None:
        """Returns when everything has happened at Stripe that was due by then."""
        began = time.monotonic()
        for waits, seconds in ((self._is_behind, LOOKS_S_MAX), (self._is_sending, UNDER_WAY_S_MAX)):
            while waits(moment_ms) and time.monotonic() - began < seconds:
                time.sleep(0.005)
        self.waited_s += time.monotonic() - began
        face = self._sandbox.control("clock", set=moment_ms // 1000, stands=True)
        self._page[NOW] = face["now"] * 1000

    def _is_behind(self, moment_ms: int) -> bool:
        return any(self._page[SEEN + slot] < moment_ms - BEHIND_MS for slot in self._alive())

    def _is_sending(self, _: int) -> bool:
        return any(self._page[UNDER_WAY + slot] > 0 for slot in self._alive())

    def _alive(self) -> list[int]:
        processes = [worker.process for worker in self._workers]
        return [slot for slot, one in enumerate(processes) if one is not None and one.poll() is None]


class ClockedWorker(NurseryWorker):
    """A slot of the product's own billing worker; only its clock is another one."""

    def __init__(self, environment: dict[str, str], folder: Path, page: Path, slot: int) -> None:
        super().__init__("billing", environment, folder, METERLINE_WORKER__INSTANCE_ID=f"billing-{slot}")
        self.create = _Creation(page, slot)
        self._page, self._slot = Page(page), slot

    def start(self, **how: object) -> None:
        self._page[SEEN + self._slot] = NEVER_LOOKED
        self._page[UNDER_WAY + self._slot] = 0
        super().start(**how)


class _Creation:
    """Makes a worker's app, in its own process."""

    def __init__(self, page: Path, slot: int) -> None:
        self._page, self._slot = page, slot

    def __call__(self, settings: Settings) -> WorkerApp:
        page, place = Page(self._page), UNDER_WAY + self._slot

        class Telling(StripeSender):
            """Tells how many requests are reserved or made."""

            def reserve(self, lane: tuple[str, str]) -> bool:
                is_reserved = super().reserve(lane)
                page[place] += is_reserved
                return is_reserved

            def release(self, lane: tuple[str, str]) -> None:
                super().release(lane)
                page[place] -= 1

            async def send(self, record: UsageRecord, committed_at: float) -> Outcome:
                try:
                    return await super().send(record, committed_at)
                finally:
                    page[place] -= 1

        billing_worker.StripeSender = Telling
        return billing_worker.create_app(settings, VirtualClock(self._page, self._slot))
