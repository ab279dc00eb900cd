"""What a task did, by its own word: lines that are on the disk before the next step is taken.

One file per racing process, one JSON object per line: `at` (milliseconds since the epoch), `do`, and facts.

    start     life                                    a process began (again)
    ask       rid task attempt micro ttl_ms           before the first reserve
    granted   rid micro until                         `until`: earliest deadline the hold can have
    refused   rid micro available                     not enough credits
    work      rid task event micro sku                a unit of work was done; before it is published
    ack       rid event micro partition offset        Kafka has it
    conflict  rid event micro                         other credits under an event id, about to be published
    settle    rid parts final                         before the call; a part: [partition, offset, micro]
    renewed   rid until  | lapsed rid
    void      rid                                     before the call
    end       rid how                                 settled, voided, refused, left (to the log's clock)
    done      task how                                never to be run again
    kill      kind                                    the process kills itself now

A kill leaves at most a torn last line, which readers pass by. `micro` are micro-credits.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["TaskLog", "now_ms", "read_lines"]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class TaskLog:
    """Appends. Lines of concurrent tasks share an fsync. For one event loop."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.write(self._file, b"\n")  # ends a line that a killed process left torn
        self._syncing: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    def note(self, do: str, **facts: Any) -> None:
        """Written in order, and safe from a killed process; on the disk with the next `write`."""
        line = json.dumps({"at": now_ms(), "do": do, **facts}, separators=(",", ":"))
        os.write(self._file, line.encode() + b"\n")

    async def write(self, do: str, **facts: Any) -> None:
        """On the disk when it returns."""
        self.note(do, **facts)
        if self._next is None:
            self._next = asyncio.create_task(self._sync(self._syncing))
        await asyncio.shield(self._next)

    def write_now(self, do: str, **facts: Any) -> None:
        """As `write`; blocks everything."""
        self.note(do, **facts)
        os.fsync(self._file)

    async def _sync(self, before: asyncio.Task[None] | None) -> None:
        """An fsync that begins after the line was written: the one under way may have missed it."""
        if before is not None:
            await before
        self._syncing, self._next = self._next, None
        await asyncio.to_thread(os.fsync, self._file)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line."""
    if not path.exists():
        return
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line
