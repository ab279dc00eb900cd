"""An event loop on a thread of its own: how plain threads use what is written for asyncio."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from meterline.errors import UserError

__all__ = ["LoopThread"]

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines for any number of threads, all on one loop.

    Args:
        owner: the class that people connected, for messages to them.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._loop = asyncio.new_event_loop()
        self._process_id = os.getpid()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"meterline-{owner.lower()}", daemon=True
        )
        self._thread.start()

    def run(self, call: Coroutine[Any, Any, Result], *, is_cancelled_with_us: bool = True) -> Result:
        """Do it there and wait for it, from any other thread.

        Args:
            call: what to do.
            is_cancelled_with_us: whether an interrupt (Ctrl-C) while we wait cancels it.

        Raises:
            UserError: this is a forked process (threads stay behind at a fork), or the thread was stopped.
        """
        if os.getpid() != self._process_id:
            call.close()
            raise UserError(
                f"this {self._owner} was connected before a fork and can't be used from the new process; "
                "connect in the process that works (for example in a post-fork hook)"
            )
        if self._loop.is_closed() or threading.current_thread() is self._thread:
            call.close()
            raise UserError(f"this {self._owner} is closed; connect again")
        doing = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return doing.result()
        except BaseException:  # raised again: an interrupt is one, too
            if is_cancelled_with_us:
                doing.cancel()
            raise

    def stop(self) -> None:
        """End the loop and its thread. Again, or in a forked process: does nothing."""
        if self._loop.is_closed() or os.getpid() != self._process_id:
            return
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
