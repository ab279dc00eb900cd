"""Short histories that are told, not drawn: a world, its traffic and its books together."""

from __future__ import annotations

from contextlib import contextmanager

from tests.simulation.books import Books
from tests.simulation.histories import come_to_rest
from tests.simulation.model import Usage
from tests.simulation.traffic import Traffic
from tests.simulation.world import SETTINGS, World


class Scene:
    """What a test says to a world. Credits are micro-credits; everything is in partition 0 unless said."""

    def __init__(self, world):
        self.world = world
        self.traffic = Traffic(world)
        self.books = Books(world, self.traffic)

    def publish(self, event_id, credits_micro, *, client="acme", ago_ms=0, partition=0):
        usage = Usage(event_id, client, "gpu", credits_micro, self.world.wall_ms() - ago_ms)
        return self.traffic.publish(partition, usage)

    def advance(self, seconds=1.0):
        """Let time pass; the books are judged on the way."""
        for _ in range(10):
            self.world.advance(seconds / 10)
            self.books.check()

    def until(self, condition, seconds=20.0):
        """Let time pass until something holds."""
        ends = self.world.now + seconds
        while not condition():
            assert self.world.now < ends, "it never came to this"
            self.world.advance(0.005)
            self.books.check()

    def owner(self, partition=0):
        """The process that has a partition now, healthy or not."""
        return next(w for w in self.world.workers.values() if w.is_alive and partition in w.engine.partitions)

    def other(self, worker):
        (other,) = (w for w in self.world.workers.values() if w.name != worker.name)
        return other

    def counted(self, partition=0):
        """(accepted, duplicates, dead letters), as committed."""
        counters = self.books.meta(partition).counters
        return (counters.accepted, counters.duplicates, counters.dead_letters)

    def credits_at_rest(self):
        """Client -> micro-credits, when all is healed and done: ledger, windows and totals say the same."""
        come_to_rest(self.world, self.traffic, self.books)
        rows, windows, totals = self.books.credits()
        assert rows == windows == totals
        return rows


@contextmanager
def scene(seed=0, settings=SETTINGS, *, names=("a", "b"), waits=True):
    """A world whose workers have their two partitions; `waits=False`: that have not begun yet."""
    with World(seed, settings, names) as world:
        told = Scene(world)
        if waits:
            told.advance(2)
            told.until(lambda: sum(len(w.engine.partitions) for w in world.workers.values()) == 2)
        yield told
