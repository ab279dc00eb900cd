"""The same words for plain threads: the asyncio meter on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from meterline.task.attempt import Task
from meterline.task.desk import Credits

if TYPE_CHECKING:
    from meterline.task.meter import Meter

__all__ = ["LoopThread", "SyncMeter", "SyncTask"]

Answer = TypeVar("Answer")


class LoopThread:
    """An event loop on its own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="meterline-meter", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Answer], *, is_cancelled_with_us: bool = False) -> Answer:
        """Do it there and wait, from any other thread.

        Args:
            is_cancelled_with_us: whether an interrupt (Ctrl-C) while we wait cancels it; otherwise it goes
            on.
        """
        doing = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return doing.result()
        except BaseException:
            if is_cancelled_with_us:
                doing.cancel()
            raise

    def close(self) -> None:
        """End the thread."""
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


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
        self._thread.run(self._task.__aenter__(), is_cancelled_with_us=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.run(self._task.__aexit__(kind, error, trace))


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
        self._thread.run(self._meter.flush(timeout_s), is_cancelled_with_us=True)
