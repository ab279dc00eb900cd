"""A worker that dies at a named step: `python -m meterline.local.crash metering --at STEP --times N`.

For the demo's chaos and for crash tests. SIGKILL, from inside: nothing is flushed, nothing is told. With
`--stop` it falls asleep there instead (SIGSTOP), until SIGCONT comes: a process that stalls and wakes up.
"""

from __future__ import annotations

import argparse
import os
import signal

from meterline.billing.worker import create_app as create_billing
from meterline.metering.worker import create_app as create_metering
from meterline.settings import load_settings
from meterline.streaming.app import run_worker
from meterline.streaming.steps import Step, observe

__all__ = ["main"]

WORKERS = {"metering": create_metering, "billing": create_billing}


def main() -> None:
    """Run the worker; die, or fall asleep, when it reaches the step for the n-th time."""
    parser = argparse.ArgumentParser(prog="python -m meterline.local.crash", description=__doc__)
    parser.add_argument("worker", choices=WORKERS)
    parser.add_argument("--at", type=Step, choices=list(Step), required=True, help="the step to die at")
    parser.add_argument("--times", type=int, default=1, help="how often it is reached: 3 survives two")
    parser.add_argument("--stop", action="store_true", help="SIGSTOP, once, instead of SIGKILL")
    arguments = parser.parse_args()
    left = arguments.times
    sent = signal.SIGSTOP if arguments.stop else signal.SIGKILL

    def count_down(step: Step) -> None:
        nonlocal left
        if step is arguments.at:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), sent)

    observe(count_down)
    run_worker(WORKERS[arguments.worker](load_settings()))


if __name__ == "__main__":
    main()
