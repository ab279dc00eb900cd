"""Work that asks before it starts: the tasks of a client whose credits run out."""

from __future__ import annotations

import asyncio
import csv
import time
from dataclasses import dataclass
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import TextIO

from meterline.quota import CreditsExhausted, QuotaUnavailable
from meterline.settings import Settings
from meterline.task import Meter

__all__ = ["TASK_FIELDS", "Worked", "work_until_refused"]

TASK_FIELDS = ("client_id", "correlation_id", "sku", "credits")
SKU = "gpu-second"
RUNNERS = 16
"""They race for the last credits."""
RESERVED = Decimal("1.75")
"""Set aside for each task; what it costs in the end is a quarter, a half, three quarters or all of it."""
TASK_S = 0.005
OPEN_S_MAX = 60.0
"""How long tasks wait for the buckets to open: they are closed until the quota worker has read the log."""
RETRY_S = 0.2


@dataclass(slots=True)
class Worked:
    """What became of the tasks."""

    done: int = 0
    failed: int = 0
    """Before they cost anything: their reservation was given back."""
    refused: int = 0


class _BrokenWorkError(Exception):
    """The work itself fails, as some does."""


def work_until_refused(settings: Settings, client_id: str, run_id: str, file: Path) -> Worked:
    """Run tasks side by side until nobody gets credits for another one.

    Args:
        file: gets a line for each task that was done, when it was: the checker's input.

    Raises:
        QuotaUnavailable: the buckets stay closed.
    """
    with file.open("w", newline="") as text:
        trial = _Trial(client_id, run_id, text)
        return asyncio.run(trial.work(settings))


class _Trial:
    """One client's tasks."""

    def __init__(self, client_id: str, run_id: str, text: TextIO) -> None:
        self._client_id = client_id
        self._run_id = run_id
        self._numbers = count(1)
        self._done = csv.writer(text)
        self._done.writerow(TASK_FIELDS)
        self._worked = Worked()

    async def work(self, settings: Settings) -> Worked:
        """Again and again: what a task set aside and did not use is there for the next one."""
        worked = self._worked
        async with Meter.connect(settings) as meter:
            begun = -1
            while worked.done + worked.failed > begun:
                begun = worked.done + worked.failed
                await asyncio.gather(*(self._run(meter) for _ in range(RUNNERS)))
                await meter.flush()
        return worked

    async def _run(self, meter: Meter) -> None:
        """One task after the other, until one is refused."""
        worked, deadline = self._worked, time.monotonic() + OPEN_S_MAX
        for number in self._numbers:
            try:
                await self._task(meter, number)
                worked.done += 1
            except _BrokenWorkError:
                worked.failed += 1
            except CreditsExhausted:
                worked.refused += 1
                return
            except QuotaUnavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _task(self, meter: Meter, number: int) -> None:
        correlation_id = f"{self._run_id}-gpu-{number}"
        async with meter.task(
            client_id=self._client_id, sku=SKU, credits=RESERVED, correlation_id=correlation_id
        ) as task:
            await asyncio.sleep(TASK_S)
            if number % 10 == 0:
                raise _BrokenWorkError
            cost = RESERVED * (1 + number % 4) / 4
            self._done.writerow((self._client_id, correlation_id, SKU, cost))
            task.charge(sku=SKU, credits=cost)
