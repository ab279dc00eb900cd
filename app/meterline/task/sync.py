"""The same words for plain threads: the asyncio meter on a thread of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from meterline.quota.loop_thread import LoopThread
from meterline.task.attempt import Task
from meterline.task.desk import Credits

if TYPE_CHECKING:
    from meterline.task.meter import Meter

__all__ = ["SyncMeter", "SyncTask"]


class SyncTask:
    """A `Task` for `with`."""

    def __init__(self, task: Task, thread: LoopThread) -> None:
        self._task = task
        self._thread = thread

    @property
    def reservation_id(self) -> str:
        """Of this attempt."""
        return self._task.reservation_id

    @property
    def charge(self) -> Any:
        """See `Task.charge`."""
        return self._task.charge

    def __enter__(self) -> Self:
        self._thread.run(self._task.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What was done is kept and settled, whatever becomes of the caller.
        self._thread.run(self._task.__aexit__(kind, error, trace), is_cancelled_with_us=False)


class SyncMeter:
    """A `Meter` for any number of threads; made by `with Meter.connect(settings)`."""

    def __init__(self, meter: Meter, thread: LoopThread) -> None:
        self._meter = meter
        self._thread = thread

    def task(
        self,
        *,
        client_id: str,
        sku: str,
        credits: Credits,  # noqa: A002 - the domain's word; nobody calls the interpreter's credits()
        correlation_id: str,
        attributes: Mapping[str, str] | None = None,
        source: str = "",
    ) -> SyncTask:
        """See `Meter.task`."""
        task = self._meter.task(
            client_id=client_id,
            sku=sku,
            credits=credits,
            correlation_id=correlation_id,
            attributes=attributes,
            source=source,
        )
        return SyncTask(task, self._thread)

    def flush(self, timeout_s: float = 30.0) -> None:
        """See `Meter.flush`."""
        self._thread.run(self._meter.flush(timeout_s))
