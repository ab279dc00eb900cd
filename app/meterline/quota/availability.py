"""When Redis is away or slow: how it is noticed, and what is not waited for then.

The breaker counts script calls that got no answer in time. After a few in a row it opens: calls are no longer
sent, each client's policy decides at once, and one probe at a time asks whether Redis is back. Between two
probes nothing waits for a server that does not answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final

from meterline import metrics
from meterline.domain.credits import format_credits

__all__ = ["Availability", "Unreachable"]

FAILURES_MAX: Final = 3
"""Calls in a row without an answer until the breaker opens. One alone may be a slow fsync of the server."""
PROBE_FIRST_S: Final = 0.1
PROBE_MAX_S: Final = 2.0
"""Probes back off to this: a server that comes back is used again soon, one that is gone is left alone."""

log = logging.getLogger("meterline.quota")  # a library's: the program it runs in decides what is seen


class Unreachable(Exception):  # noqa: N818 - inside the library; callers see QuotaUnavailable or their policy
    """No decision: the text says why."""


class Availability:
    """The breaker in front of one server.

    Attributes:
        tripped: it is open: don't ask.
    """

    def __init__(self, probe: Callable[[], Awaitable[None]]) -> None:
        self.tripped = False
        self._probe = probe
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None
        self._reason = ""
        self._uncovered = 0
        self._uncovered_micro = 0

    def succeeded(self) -> None:
        """A call was answered."""
        self._failures = 0
        if self.tripped:
            self._close()

    def failed(self, reason: str) -> None:
        """A call was not answered in time."""
        self._failures += 1
        if self._failures >= FAILURES_MAX and not self.tripped:
            self.trip(reason)

    def trip(self, reason: str) -> None:
        """Open the breaker now."""
        if not self.tripped:
            metrics.QUOTA_BREAKER_OPEN.inc()
        self.tripped = True
        self._reason = reason
        log.warning(
            "Redis does not decide (%s): clients' policies do, until it is back. Whatever they allow is "
            "charged by the log without a limit; the end of this is logged with its sum",
            reason,
        )
        if self._probing is None:
            self._probing = asyncio.get_running_loop().create_task(self._probe_until_back())

    @property
    def reason(self) -> str:
        """Why it is open."""
        return self._reason

    def allowed(self, micro: int) -> None:
        """A policy allowed work that no credits are set aside for."""
        self._uncovered += 1
        self._uncovered_micro += micro
        metrics.QUOTA_UNCOVERED_MICRO.inc(micro)

    async def stop(self) -> None:
        """End probing."""
        if self.tripped:
            self.tripped = False
            metrics.QUOTA_BREAKER_OPEN.dec()
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
            self._probing = None

    def _close(self) -> None:
        self.tripped = False
        metrics.QUOTA_BREAKER_OPEN.dec()
        log.warning(
            "Redis decides again; allowed meanwhile: %d tasks, %s credits",
            self._uncovered,
            format_credits(self._uncovered_micro),
        )
        self._uncovered = self._uncovered_micro = 0

    async def _probe_until_back(self) -> None:
        """Half open: one call asks, the others don't wait for it."""
        pause_s = PROBE_FIRST_S
        try:
            while self.tripped:
                # Many processes lost the same server at once; they shall not come back at once.
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
                try:
                    await self._probe()
                except Unreachable as error:
                    self._reason = str(error)
                    pause_s = min(2 * pause_s, PROBE_MAX_S)
                else:
                    self.succeeded()
        finally:
            self._probing = None
