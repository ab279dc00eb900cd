"""The one clock of a billing worker. Whoever simulates months gives `create_app` another one."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Protocol

from meterline.logs import get_logger

__all__ = ["Clock", "StripeClock"]

SKEW_WARN_MS = 60_000
"""The margin of an invoice is ten minutes, Stripe's limit for the future five: a minute is worth a look."""

log = get_logger(__name__)


class Clock(Protocol):
    """What billing knows of time."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""

    def boot_s(self) -> float:
        """Seconds that only grow, also while the machine sleeps."""

    def heard(self, date: str) -> None:
        """Stripe answered, and this was its `Date` header."""


class StripeClock:
    """The time at Stripe: this machine's clock, corrected by the difference its latest answer showed.

    Identifiers are forgotten, timestamps refused and invoices finalised by Stripe's clock, not by ours. The
    header has whole seconds and is a moment old when it is read, so a difference below two seconds is none.
    """

    def __init__(self) -> None:
        self._skew_ms = 0

    def now_ms(self) -> int:
        """Milliseconds since the epoch, as Stripe counts them."""
        return time.time_ns() // 1_000_000 + self._skew_ms

    def boot_s(self) -> float:
        """The system's clock that also runs while the machine sleeps, where it has one."""
        clock = getattr(time, "CLOCK_BOOTTIME", None)
        return time.monotonic() if clock is None else time.clock_gettime(clock)

    def heard(self, date: str) -> None:
        """Correct the difference; a header that is no date changes nothing."""
        try:
            theirs_ms = int(parsedate_to_datetime(date).timestamp() * 1000)
        except (TypeError, ValueError):
            return
        skew_ms = theirs_ms - time.time_ns() // 1_000_000
        if abs(skew_ms) < 2_000:
            skew_ms = 0
        if abs(skew_ms - self._skew_ms) >= SKEW_WARN_MS:
            log.warning(
                "this machine's clock differs from Stripe's; Stripe's is used",
                differs_by_s=round(skew_ms / 1000),
            )
        self._skew_ms = skew_ms
