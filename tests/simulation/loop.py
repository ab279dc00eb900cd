"""An event loop without threads, sockets or a clock of its own: somebody turns it, callback by callback.

Each simulated process has one. A process that is killed or stopped is a loop that is no longer turned: no
cleanup runs in it, as after SIGKILL and SIGSTOP.
"""

from __future__ import annotations

import asyncio
from asyncio import events
from collections import deque
from heapq import heappop, heappush
from itertools import count


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of a loop as tasks, futures and timers need.

    Args:
        clock: seconds; `time()` of the loop.
        on_error: gets what nobody awaited: the exceptions of forgotten tasks.
    """

    def __init__(self, clock, on_error):
        self.tasks = set()
        self._clock = clock
        self._on_error = on_error
        self._ready = deque()
        self._timers = []
        self._numbers = count()

    # -- turned from outside

    @property
    def is_ready(self):
        return bool(self._ready)

    def turn(self):
        """Run one callback."""
        handle = self._ready.popleft()
        if handle._cancelled:
            return
        events._set_running_loop(self)
        try:
            handle._run()
        finally:
            events._set_running_loop(None)

    def next_timer(self):
        """When the next timer is due; None without one."""
        while self._timers and self._timers[0][2]._cancelled:
            heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def ring(self):
        """Make what is due ready."""
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            self._ready.append(heappop(self._timers)[2])

    def end(self):
        """Close all coroutines, so that none is closed by the garbage collector amid another history."""
        self._ready.clear()
        self._timers.clear()
        for task in list(self.tasks):
            if not task.done():
                task.get_coro().close()
        self.tasks.clear()

    # -- what asyncio calls

    def time(self):
        return self._clock()

    def call_soon(self, callback, *args, context=None):
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(self, delay, callback, *args, context=None):
        return self.call_at(self._clock() + delay, callback, *args, context=context)

    def call_at(self, when, callback, *args, context=None):
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle):
        """Found out when its time comes."""

    def create_future(self):
        return asyncio.Future(loop=self)

    def create_task(self, coro, *, name=None, context=None):
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def get_debug(self):
        return False

    def is_running(self):
        return True

    def is_closed(self):
        return False

    def call_exception_handler(self, context):
        error = context.get("exception")
        if error is not None:
            self._on_error(error)
