"""A process that does metered tasks and says which are finished; it may kill itself at any step of one.

`python tests/task_process.py CLIENT PREFIX COUNT STEP`: PREFIX-0, PREFIX-1, ... are the tasks, eight at a
time. It prints the number of each task once its block is left, and ends by SIGKILL when it reaches STEP for
the KILL_AT-th time. Settings come from the environment. Work is allowed when nobody can decide.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from meterline.domain.clients import QuotaPolicy
from meterline.logs import configure_logs
from meterline.task import Meter, drain, settling, spool

STEPS = ("reserved", "writing", "spooled", "acknowledged", "settling", "marking", "marked")
FINISHED_MIN = 20
"""It goes on living until so many tasks are finished: some of them are at every later step then."""
AT_ONCE = 8
PAUSE_S = 0.02

finished = 0


def die() -> None:
    """At once, as from outside."""
    if finished >= FINISHED_MIN:
        os.kill(os.getpid(), signal.SIGKILL)


def die_before(owner: object, name: str) -> None:
    """Put the deadly step in front of a function."""
    function = getattr(owner, name)

    def dying(*arguments):
        die()
        return function(*arguments)

    setattr(owner, name, dying)


def die_at(step: str) -> None:
    """Arrange for it. With `spooled` nothing is published before, so that only the spool knows of it."""
    if step == "writing":
        die_before(os, "fdatasync")
    if step == "spooled":
        drain.Drainer._send = lambda *_: None
    if step == "acknowledged":
        die_before(drain.Drainer, "_note")
    if step == "settling":
        die_before(settling.Settler, "add")
    if step == "marking":
        die_before(spool, "write_marker")
    if step == "marked":
        write = spool.write_marker

        def marked(*arguments):
            write(*arguments)
            die()

        spool.write_marker = marked


async def main(client_id: str, prefix: str, count: int, step: str) -> None:
    """Do the tasks."""
    free = asyncio.Semaphore(AT_ONCE)

    async def work(number: int) -> None:
        global finished  # noqa: PLW0603 - one count for the process
        async with free:
            task = meter.task(
                client_id=client_id, sku="gpu", credits="0.5", correlation_id=f"{prefix}-{number}"
            )
            async with task:
                if step == "reserved":
                    die()
                await asyncio.sleep(PAUSE_S)
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()
            finished += 1
            if step == "spooled":
                die()

    configure_logs()  # standard output is for the numbers alone
    async with Meter.connect(policy=lambda _: QuotaPolicy.ALLOW, close_timeout_s=30) as meter:
        await asyncio.gather(*map(work, range(count)))


if __name__ == "__main__":
    die_at(sys.argv[4])
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
