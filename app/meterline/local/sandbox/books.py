"""State, journal, clock and timeline of one sandbox, held together: nothing changes but through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meterline.local.sandbox.clock import Clock
from meterline.local.sandbox.journal import Journal
from meterline.local.sandbox.state import Change, State
from meterline.local.sandbox.timeline import Timeline

__all__ = ["Books"]


class Books:
    """A replayed state and its open journal.

    Args:
        real_clock: the real Unix seconds.
    """

    def __init__(self, state: State, journal: Journal, real_clock: Callable[[], float]) -> None:
        self.state = state
        self.clock = Clock(state, real_clock)
        self._journal = journal
        self._timeline = Timeline(state)

    def now(self) -> int:
        """Unix seconds, after everything has happened that was due by then. Begin every request with it."""
        now = int(self.clock())
        while (record := self._timeline.due(now)) is not None:
            self._take(record["at"], record["changes"])
        self.state.forget(now)
        return now

    def commit(self, at: int, changes: Sequence[Change]) -> None:
        """Make changes true, together; they are on disk when `flushed` has returned."""
        if changes:
            self._take(at, changes)

    async def flushed(self) -> None:
        """Return when all that is true by now is on disk. No answer leaves before."""
        await self._journal.flushed()

    def _take(self, at: int, changes: Sequence[Change]) -> None:
        record = {"at": at, "changes": list(changes)}
        self._journal.append(record)
        self.state.take(record)
        self._timeline.watch(changes)
