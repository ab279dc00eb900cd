"""The Faust table: declared to Faust, filled by us with what was committed, restored by us.

Faust's own recovery never ends on a transactional changelog (the last offset is a commit marker, which no
record ever reaches), reads uncommitted records and is a hundred times slower. It is told that there is
nothing to recover; `on_recovery_completed`, which it awaits before it delivers, does the work.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import faust
from faust.stores import memory
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


class CommittedStore(memory.Store[bytes, bytes]):
    """What a table shows of its partitions' states. Nobody writes through it: the engine owns them."""

    def __post_init__(self) -> None:
        """Called by Faust when it has made one."""
        self.committed: dict[int, dict[bytes, bytes]] = {}
        self._key_partition = {}

    @property
    def data(self) -> Mapping[bytes, bytes]:  # type: ignore[override] # Faust reads it and sets it nowhere else
        """All partitions as one mapping; their keys differ, each begins with its partition."""
        return MappingProxyType(ChainMap({}, *self.committed.values()))


class CommittedTable(faust.Table[bytes, bytes]):
    """A table that holds exactly what its partitions' owners have committed."""

    take_over: Callable[[set[int]], Awaitable[None]]
    """Set by the engine: own exactly these partitions."""

    def _new_store(self) -> Any:
        return CommittedStore("memory://", self.app, self, table_name=self.name, loop=self.loop)

    @property
    def committed(self) -> dict[int, dict[bytes, bytes]]:
        """Partition -> its committed state: restored, changed and dropped by the engine."""
        return cast(CommittedStore, self.data).committed

    async def on_recovery_completed(self, active_tps: Any, standby_tps: Any) -> None:
        """Called after each assignment, before any record is delivered."""
        await super().on_recovery_completed(active_tps, standby_tps)
        await self.take_over({tp.partition for tp in active_tps})
