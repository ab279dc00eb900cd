"""The Faust table: declared to Faust, filled by us with what was committed, restored by us.

Faust's own recovery never ends on a transactional changelog (the last offset is a commit marker, which no
record ever reaches), reads uncommitted records and is a hundred times slower. It is told that there is
nothing to recover; `on_recovery_completed`, which it awaits before it delivers, does the work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import faust
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery

__all__ = ["CommittedTable", "CommittedTables"]


class _NothingToRecover(Recovery):
    def need_recovery(self) -> bool:
        """Never: CommittedTable restores itself."""
        return False


class CommittedTables(TableManager):
    """Faust's table manager without its recovery."""

    @property
    def recovery(self) -> Recovery:
        """The recovery service that recovers nothing."""
        if self._recovery is None:
            self._recovery = _NothingToRecover(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery


class CommittedTable(faust.Table[bytes, bytes]):
    """A table that holds exactly what its partitions' owners have committed."""

    take_over: Callable[[set[int]], Awaitable[None]]
    """Set by the engine: own exactly these partitions."""

    async def on_recovery_completed(self, active_tps: Any, standby_tps: Any) -> None:
        """Called after each assignment, before any record is delivered."""
        await super().on_recovery_completed(active_tps, standby_tps)
        await self.take_over({tp.partition for tp in active_tps})

    def apply_committed(self, partition: int, items: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Bring the local copy up to a commit."""
        store: Any = self.data
        data, partition_of = store.data, store._key_partition
        changed = dict(items)
        data.update(changed)
        partition_of.update(dict.fromkeys(changed, partition))
        for key in [key for key, value in changed.items() if value is None]:
            del data[key], partition_of[key]
