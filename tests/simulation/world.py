"""The simulated world: one clock, one broker, one ledger, one group, and worker processes that die.

Everything happens in the order of virtual time; chance comes from one seed. The engine, the owner and the
meter are the real ones; Faust, Kafka, ClickHouse and the operating system are simulated.
"""

from __future__ import annotations

import logging
import random
from heapq import heappop, heappush
from itertools import count

import structlog
from tests.simulation.broker import Broker, FencedError
from tests.simulation.group import Group
from tests.simulation.ledger import Ledger
from tests.simulation.network import Connection, LostAnswerError
from tests.simulation.worker import Killed, Worker

from meterline.errors import PartitionHalted
from meterline.settings import MeteringSettings
from meterline.streaming import engine, steps

START_MS = 1_700_000_000_000
PARTITIONS = (0, 1)
LATENCIES_S = (0.001, 0.001, 0.001, 0.002, 0.005, 0.04, 0.15)
LENGTH_MS, HORIZON_MS = 1_000, 60_000
SILENT = structlog.make_filtering_bound_logger(logging.CRITICAL)
STANDSTILL = 3_000
"""Callbacks at one instant; a flush takes fewer than a hundred."""
RESTART_S = 0.3
"""What a supervisor takes to start a process again."""

SETTINGS = MeteringSettings(
    window_length_ms=LENGTH_MS,
    dedupe_horizon_ms=HORIZON_MS,
    allowed_lateness_ms=0,
    keep_closed_windows_ms=2_000,
    late_snapshot_interval_ms=500,
)


class World:
    """Use as a context: the named steps and the way out of the real code lead here meanwhile."""

    def __init__(self, seed=0, settings=SETTINGS, names=("a", "b"), first_offset=0):
        self.random = random.Random(seed)
        self.settings = settings
        self.settings_of = {}
        """Name -> what its processes have from their next start on, instead of `settings`."""
        self.program_of = {}
        """The same for versions of the program: name -> `two_versions.Program`."""
        self.now = 0.0
        self.jumped_ms = 0
        self.messages = self.turns = 0
        self.surprises = []
        """Errors that no product code may raise here."""
        self.plans = {}
        """(name, step) -> ("kill" or "stop", at which arrival there)."""
        self.on_step = self.on_sent = self.on_served = lambda *_: None
        """Called with the process and its step, or its message's number: what a test does at that moment."""
        self.commits_to_lose = {}
        self._events = []
        self._numbers = count()
        self._waiting_for_news = []
        self.broker = Broker(self.wall_ms, self.later, self.random)
        for partition in PARTITIONS:
            log = self.broker.logs["usage.events", partition]
            log.start = log.end = first_offset
        self.ledger = Ledger()
        self.group = Group(self, PARTITIONS)
        self.workers = {}
        self.lives = []
        self.reached_steps = set()
        self._current = None
        for name in names:
            self.start(name)

    def __enter__(self):
        self._die = engine.die
        engine.die = self._end_process
        steps.observe(self._reached)
        # Thousands of histories would write millions of lines; what counts is in the books.
        self._logging = structlog.get_config()
        structlog.configure(wrapper_class=SILENT, cache_logger_on_first_use=False)
        return self

    def __exit__(self, *_):
        for worker in self.lives:
            worker.loop.end()
        engine.die = self._die
        steps.observe(None)
        structlog.configure(**self._logging)

    # -- time and chance

    def clock(self):
        return self.now

    def wall_ms(self):
        """What the wall clocks say, the broker's and the workers'."""
        return START_MS + self.jumped_ms + int(self.now * 1000)

    def jump(self, ms):
        """All clocks are set forward; nothing else happens meanwhile."""
        self.jumped_ms += ms

    def latency(self):
        return self.random.choice(LATENCIES_S)

    def fetch_max(self):
        return self.random.choice((1, 2, 3, 100))

    def at(self, when, callback):
        heappush(self._events, (when, next(self._numbers), callback))

    def later(self, seconds, callback):
        self.at(self.now + seconds, callback)

    def advance(self, seconds):
        """Let everything happen that happens within this time."""
        until = self.now + seconds
        self._run_ready()
        instants = 0
        while (soonest := self._soonest()) is not None and soonest <= until:
            instants = instants + 1 if soonest <= self.now else 0
            assert instants < STANDSTILL, "something happens again and again, and time stands still"
            self.now = max(self.now, soonest)
            while self._events and self._events[0][0] <= self.now:
                heappop(self._events)[2]()
            for worker in self.workers.values():
                if worker.is_responsive:
                    worker.loop.ring()
            self._run_ready()
        self.now = until

    def _soonest(self):
        soonest = self._events[0][0] if self._events else None
        for worker in self.workers.values():
            if worker.is_responsive:
                timer = worker.loop.next_timer()
                if timer is not None and (soonest is None or timer < soonest):
                    soonest = timer
        return soonest

    def _run_ready(self):
        ran, standstill = True, self.turns + STANDSTILL
        while ran:
            ran = False
            for worker in list(self.workers.values()):
                loop = worker.loop
                while loop.is_ready and worker.is_responsive:
                    self._current = worker
                    if worker.program is None:
                        loop.turn()
                    else:
                        with worker.program.runs():
                            loop.turn()
                    ran = True
                    self.turns += 1
                    assert self.turns < standstill, "a process is busy for ever"

    def heal(self):
        """Whatever was broken or planned to break works again; stopped processes go on."""
        self.plans.clear()
        self.commits_to_lose.clear()
        self.ledger.is_away = False
        self.ledger.partial.clear()
        for worker in self.workers.values():
            worker.wake()
        for name in [name for name, worker in self.workers.items() if not worker.is_alive]:
            self.restart(name)

    # -- processes

    def start(self, name):
        """A new process under a name, the one before being dead."""
        worker = self.workers[name] = Worker(self, name)
        self.lives.append(worker)
        return worker

    def kill(self, name, restart_s=RESTART_S):
        """SIGKILL. A supervisor starts it again, unless told not to (None)."""
        self.end(self.workers[name], restart_s)

    def end(self, worker, restart_s):
        """This life of a process is over; unless None, a supervisor begins the next one after some time."""
        if worker.is_alive:
            worker.kill()
            if restart_s is not None:
                self.later(restart_s, lambda: self.restart(worker.name))

    def restart(self, name):
        if not self.workers[name].is_alive:
            self.start(name)

    def _end_process(self, why, error=None):
        """In the place of `streaming.fatal.die`."""
        if isinstance(error, GeneratorExit):
            raise error  # the coroutine is being closed, after the end of the history
        worker = self._current
        if not isinstance(error, Killed):
            worker.ended = why
            # Halted: a verdict on what another owner has gone on from meanwhile.
            if not isinstance(error, (FencedError, LostAnswerError, PartitionHalted)):
                self.surprises.append(error or RuntimeError(why))
            self.end(worker, RESTART_S)
        raise Killed

    def _reached(self, step):
        worker = self._current
        self.reached_steps.add(step)
        self.on_step(worker, step)
        plan = self.plans.get((worker.name, step))
        if plan is None:
            return
        what, times = plan
        if times > 1:
            self.plans[worker.name, step] = (what, times - 1)
            return
        del self.plans[worker.name, step]
        if what == "stop":
            worker.stop()
        else:
            self.end(worker, RESTART_S)
            raise Killed

    # -- the network

    def connect(self, process):
        return Connection(self, process)

    def sent(self, process, number):
        self.on_sent(process, number)

    def served(self, process, number):
        self.on_served(process, number)

    def loses_commit(self, process):
        """Whether the connection breaks while this commit is under way, and on which side of it."""
        return self.commits_to_lose.pop(process.name, None)

    async def news(self, process, seconds):
        """A long poll: until something is appended to the source, or the time is over."""
        future = process.loop.create_future()
        self._waiting_for_news.append((process, future))
        process.loop.call_later(seconds, lambda: future.done() or future.set_result(None))
        await future

    def append(self, partition, value, key=b""):
        """A record of a producer without transactions. Returns the offset."""
        offset = self.broker.append("usage.events", partition, key, value)
        self.tell_news()
        return offset

    def tell_news(self):
        waiting, self._waiting_for_news = self._waiting_for_news, []
        for process, future in waiting:
            if process.is_alive and not future.done():
                self.later(0.001, lambda f=future: f.done() or f.set_result(None))
