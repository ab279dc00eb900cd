"""A worker of tasks through `Meter`, until told to stop: `python -m tests.proof.meter_worker PLAN.json`.

Its own log has a line for each unit of work before its task is left, and one for each finished task after.
Started again after a kill, it first does the unfinished tasks again.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path

from tests.proof.task_log import TaskLog, read_lines

from meterline.settings import load_settings
from meterline.task import Meter

__all__ = ["MeterPlan"]

LANES = 4
UNITS = ("gpu-second", "tokens")
UNIT_MICRO_MAX = 20_000_000
PAUSE_S = 0.15
FLUSH_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class MeterPlan:
    """What one worker does; given as a JSON file.

    Attributes:
        stop_file: when it is there, no further task is begun.
    """

    slot: int
    client_id: str
    log: str
    stop_file: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> MeterPlan:
        return cls(**json.loads(path.read_text()))


async def work(plan: MeterPlan) -> None:
    """One life."""
    path = Path(plan.log)
    lines = list(read_lines(path))
    begun = {line["task"]: line["number"] for line in lines if line["do"] == "begin"}
    finished = {line["task"] for line in lines if line["do"] == "finished"}
    log = TaskLog(path)
    log.write_now("start")
    again = [number for task, number in begun.items() if task not in finished]
    numbers = itertools.chain(again, itertools.count(max(begun.values(), default=-1) + 1))

    async with Meter.connect(load_settings()) as meter:
        async with asyncio.TaskGroup() as group:
            for _ in range(LANES):
                group.create_task(_lane(plan, meter, log, numbers, len(again)))
        await meter.flush(FLUSH_S_MAX)
    log.write_now("flushed")


async def _lane(plan: MeterPlan, meter: Meter, log: TaskLog, numbers: Iterator[int], again: int) -> None:
    """Those to be done again are done whatever the stop file says."""
    left = again
    while left > 0 or not os.access(plan.stop_file, os.F_OK):
        left -= 1
        await _task(plan, meter, log, next(numbers))


async def _task(plan: MeterPlan, meter: Meter, log: TaskLog, number: int) -> None:
    name = f"{plan.client_id}-{plan.slot}-{number}"
    chance = random.Random(name)
    amounts = [chance.randint(1, UNIT_MICRO_MAX) for _ in UNITS]
    await log.write("begin", task=name, number=number)
    reserved = Decimal(sum(amounts)).scaleb(-6)
    events = []
    async with meter.task(
        client_id=plan.client_id, sku=UNITS[0], credits=reserved, correlation_id=name
    ) as task:
        for sku, micro in zip(UNITS, amounts, strict=True):
            await asyncio.sleep(chance.uniform(0.1, 1.0) * PAUSE_S)
            event = task.charge(sku=sku, credits=Decimal(micro).scaleb(-6))
            await log.write("work", rid=task.reservation_id, task=name, event=event, sku=sku, micro=micro)
            events.append([event, micro])
    await log.write("finished", task=name, events=events)


if __name__ == "__main__":
    asyncio.run(work(MeterPlan.load(Path(sys.argv[1]))))
