"""A clock of a billing worker that stands still until a test moves it."""

from __future__ import annotations

__all__ = ["HandClock"]


class HandClock:
    """See `billing.clock.Clock`. `now` in milliseconds, `boot` in seconds."""

    def __init__(self, now, boot=0.0):
        self.now, self.boot, self.dates = now, boot, []

    def now_ms(self):
        return self.now

    def boot_s(self):
        return self.boot

    def heard(self, date):
        self.dates.append(date)
