"""`python -m tests.simulation`: thousands of histories; prints how many, and the first that goes wrong.

A failure is shown as the shortest history Hypothesis finds that fails the same way, with the world's seed in
its first line; `--seed` draws the same histories again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.simulation.histories import MeteringHistories


def main() -> int:
    """Run the histories. Exit 1 with the shortest failing one."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--histories", type=int, default=5_000)
    parser.add_argument("--steps", type=int, default=30, help="at most so many in one history")
    parser.add_argument("--seed", type=int, default=None, help="of a run before; otherwise a new one")
    arguments = parser.parse_args()
    number = random.randrange(2**32) if arguments.seed is None else arguments.seed
    sys.stdout.write(f"seed {number}\n")
    sys.stdout.flush()
    machine = type("Counted", (MeteringHistories,), {"begun": 0, "steps_taken": 0})

    def begin(self: MeteringHistories) -> None:
        machine.begun += 1
        MeteringHistories.__init__(self)

    machine.__init__ = begin
    options = settings(
        max_examples=arguments.histories,
        stateful_step_count=arguments.steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    started, cpu_started = time.monotonic(), time.process_time()
    try:
        run_state_machine_as_test(seed(number)(machine), settings=options)
    finally:
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
        sys.stdout.write(
            f"{machine.begun} histories, {machine.steps_taken} steps in {seconds:.0f} s: "
            f"{60 * machine.begun / seconds:.0f} a minute, "
            f"{60 * machine.begun / cpu_seconds:.0f} a minute of CPU\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
