"""Memory of a worker that takes in megabytes at a time, lets go of them again, and keeps a large state."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

__all__ = [
    "GIVE_BACK_INTERVAL_S",
    "give_back_memory",
    "keep_memory",
    "look_seldom_for_cycles",
    "taking_over_state",
]

GC_THRESHOLDS = (50_000, 20, 20)
"""New objects between two looks for cycles, and how often the older ones are looked at too."""
NEVER = 1 << 30

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt."""

BLOCK_BYTES_MAX = 32 << 20
"""Larger blocks are the system's own to give and take: the most that glibc allows."""

KEPT_BYTES_MAX = 256 << 20
"""Free memory beyond this goes back to the system. A worker that is behind turns over less in a flush."""

ARENAS_MAX = 1
"""What one thread lets go of is there for the next one. With an arena for each, the end of all but the first
is never given back. Threads that take turns at Python's lock seldom meet at an arena's."""

GIVE_BACK_INTERVAL_S = 60.0
"""Some hundred flushes long: what they share is asked for again in one that takes some milliseconds more."""


def keep_memory() -> None:
    """Let free memory wait for the next fetch and flush, which are about as large as the one before.

    As it is, glibc gives each megabyte back to the system at once, which has to hand it out again page by
    page, cleared: a sixth of a fast worker's time. Elsewhere than on glibc this does nothing. To be called
    before there are threads: they keep the arenas they have.
    """
    if (mallopt := _of_glibc("mallopt")) is None:
        return
    mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES_MAX)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES_MAX)
    mallopt(M_ARENA_MAX, ARENAS_MAX)


def give_back_memory() -> None:
    """Give free memory back to the system after all: the counterpart of `keep_memory`, for now and then.

    Otherwise a worker stays for ever as large as one backlog, or one stall of the machine, has made it.
    """
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the allocator; None where there is another one."""
    try:
        return cast("Callable[..., int]", getattr(ctypes.CDLL(None), name))
    except (AttributeError, OSError):
        return None


def look_seldom_for_cycles() -> None:
    """Let Python look for cycles among new objects now and then, and not at those there are already.

    Records become rows and leave again, none of them in cycles: Python's default looks for cycles every 700
    new objects and again over all that is pending, a quarter of the time a record takes.
    """
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


@contextmanager
def taking_over_state() -> Iterator[None]:
    """What is made in here is there to stay, millions of objects and no cycle.

    They are looked at once, while they are young, not again and again while they become more, and never
    afterwards. They go as ever when nobody holds them any more.
    """
    gc.set_threshold(GC_THRESHOLDS[0], NEVER, NEVER)
    try:
        yield
    finally:
        look_seldom_for_cycles()
