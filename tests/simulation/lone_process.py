"""One process without an engine in a simulated world, for whoever wants to talk to its broker alone."""

from __future__ import annotations

from tests.simulation.loop import VirtualLoop
from tests.simulation.world import World

STORY_S_MAX = 60.0


class LoneProcess:
    """Runs coroutines in virtual time."""

    def __init__(self):
        self.name = "alone"
        self.world = World(names=())
        self.loop = VirtualLoop(self.world.clock, self.world.surprises.append)
        self.is_alive = self.is_responsive = True
        self.program = None

    def __enter__(self):
        self.world.workers[self.name] = self
        self.world.__enter__()
        return self

    def __exit__(self, *exit_):
        self.loop.end()
        self.world.__exit__(*exit_)

    def run(self, coroutine):
        """What it returns."""
        task = self.loop.create_task(coroutine)
        while not task.done():
            assert self.world.now < STORY_S_MAX, "the story does not end"
            self.world.advance(0.05)
        return task.result()
