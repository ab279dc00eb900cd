"""When requests leave: the account's limit, shared by billing workers without a word between them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

__all__ = ["Pace"]

USED_SHARE = 0.95
"""Of the limit. Stripe counts requests when they arrive: some come a little later than they left, together
with the next ones, and each worker may begin a second with one."""
AHEAD_S = 2.0
"""So far ahead requests are planned, and committed with their attempts: longer than a busy flush takes, so
that the way is never empty, and well within `send.FRESH_S`."""
CAUGHT_UP_S = 0.02
"""Of what a busy loop or a slow timer lost, so much is made up for at once; the rest is not."""


class Pace:
    """Lets a worker's requests leave one after the other, at equal distances and never in a burst.

    Each partition of usage.windows has an equal part of the account's limit, and a worker the parts of the
    partitions it owns, for whichever of them needs it. Kafka gives a partition to one worker at a time, so
    the shares can't add up to more than the limit, however many workers come and go.

    Who sends plans first (`room`, `plan`), commits, and waits for its turn with `departure`; who only asks
    waits in its thread with `wait`.

    Args:
        limit_per_second: of the account.
        clock: seconds that only grow.

    Attributes:
        partitions: how many usage.windows has.
    """

    def __init__(self, limit_per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.partitions = 1
        self._limit_per_second = limit_per_second
        self._clock = clock
        self._owned: set[int] = set()
        self._planned = 0
        self._next = clock()
        self._turn = asyncio.Lock()
        self._guard = threading.Lock()

    def own(self, partition: int) -> None:
        """The worker owns a partition from now on."""
        self._owned.add(partition)

    def disown(self, partition: int) -> None:
        """It doesn't any more."""
        self._owned.discard(partition)

    @property
    def per_second(self) -> float:
        """The worker's share of the limit."""
        return self._limit_per_second * len(self._owned) / self.partitions

    def room(self) -> int:
        """How many requests more may be planned now."""
        ahead_s = AHEAD_S - max(0.0, self._next - self._clock())
        if not self._owned or ahead_s <= 0:
            return 0
        return max(0, int(ahead_s / self._distance_s()) + 1 - self._planned)

    def plan(self) -> None:
        """Plan one request."""
        self._planned += 1

    def unplan(self) -> None:
        """One that was planned won't be made."""
        self._planned -= 1

    async def departure(self) -> None:
        """Returns when a planned request may leave, in the order of the calls."""
        try:
            async with self._turn:
                while (left_s := self._claim()) > 0:  # noqa: ASYNC110 - threads claim, too
                    await asyncio.sleep(left_s)
        finally:
            self._planned -= 1

    def wait(self) -> None:
        """Returns when a request that nobody planned may leave; blocks its thread."""
        while (left_s := self._claim()) > 0:
            time.sleep(left_s)

    def _claim(self) -> float:
        """Seconds to wait; 0: leave now."""
        with self._guard:
            now = self._clock()
            if now < self._next:
                return self._next - now
            self._next = max(self._next, now - CAUGHT_UP_S) + self._distance_s()
            return 0.0

    def _distance_s(self) -> float:
        # Without a partition, whoever still asks something goes on as if there were one.
        per_second = self.per_second or self._limit_per_second / self.partitions
        return 1 / (USED_SHARE * per_second)
