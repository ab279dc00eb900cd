"""The worker's wall clock. Whoever needs it gets it as an argument: under test time is the test's.

Durations are measured with the event loop's own clock, `loop.time()`.
"""

from __future__ import annotations

import time

__all__ = ["wall_clock_ms"]


def wall_clock_ms() -> int:
    """Milliseconds since the epoch, UTC."""
    return time.time_ns() // 1_000_000
