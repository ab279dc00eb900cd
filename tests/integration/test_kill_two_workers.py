"""Two workers share the partitions: one that dies, or sleeps and wakes up, changes no total."""

from __future__ import annotations

import signal
from itertools import chain

import pytest
from tests.pipeline_books import WORKER_SETTINGS, settle
from tests.stacks import own_stack
from tests.worker_processes import ALL, WorkerProcess, ended_in_the_end, until

pytestmark = [pytest.mark.stack, pytest.mark.timeout(250)]

EXIT_FENCED = 9


stack = own_stack()
"""Every record of its topics is ours."""


@pytest.fixture(scope="module")
def environment(stack):
    return stack.process_environment() | WORKER_SETTINGS


@pytest.fixture(scope="module", autouse=True)
def billing(environment, tmp_path_factory):
    """Beside them a healthy billing worker, so that the books go to Stripe."""
    worker = WorkerProcess("billing", environment, tmp_path_factory.mktemp("billing"))
    with ended_in_the_end(worker):
        worker.start()
        yield worker


@pytest.fixture
def workers(environment, tmp_path):
    """Two metering workers with half of the partitions each. Dynamic members: names end with the process."""
    pair = [WorkerProcess("metering", environment, tmp_path) for _ in range(2)]
    with ended_in_the_end(*pair):
        for worker in pair:
            worker.start()
        until(lambda: share(pair), "both own partitions")
        yield pair


def share(workers):
    """Whether each owns some, together all, and both are ready."""
    owned = [worker.partitions() or [] for worker in workers if worker.is_ready()]
    return len(owned) == len(workers) and all(owned) and sorted(chain(*owned)) == ALL


def owns_all(worker):
    return worker.is_ready() and worker.partitions() == ALL


def test_a_killed_workers_partitions_are_taken_over_and_given_back(stack, traffic, workers):
    """SIGKILL in the middle of the work: the other one goes on with all, the restarted one gets its share."""
    victim, other = workers
    with traffic.flowing():
        victim.kill()
        until(lambda: owns_all(other), "the other one owns all")
        victim.start()
        until(lambda: share(workers), "both own partitions again")
    traffic.publish(200)

    assert settle(stack, traffic) == []


def test_a_worker_that_wakes_up_is_refused(stack, traffic, workers):
    """SIGSTOP beyond the session time-out, the other one takes over, SIGCONT: what it held is refused.

    It ends with 9. Its partitions are somebody else's, and no total knows that it was ever away.
    """
    sleeper, other = workers
    with traffic.flowing():
        sleeper.signal(signal.SIGSTOP)
        until(lambda: owns_all(other), "the other one owns all")
        sleeper.signal(signal.SIGCONT)
        code = sleeper.wait()
        sleeper.start()
        until(lambda: share(workers), "both own partitions again")
    traffic.publish(200)

    assert code == EXIT_FENCED
    assert settle(stack, traffic) == []
