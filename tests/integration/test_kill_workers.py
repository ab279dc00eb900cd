"""A worker that dies at any named step leaves nothing to repair: everything counted once, billed once."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.pipeline_books import WORKER_SETTINGS, Traffic, settle
from tests.stacks import own_stack
from tests.worker_processes import WorkerProcess, ended_in_the_end, until

from meterline.streaming.steps import Step

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

TAKE_OVER = dict.fromkeys((Step.OWNER_FENCED, Step.STATE_READ, Step.STATE_RESTORED), 2)
"""The second partition of four: some are taken over, some are not."""
COMMITTING = dict.fromkeys(
    (Step.TRANSACTION_BEGUN, Step.TRANSACTION_PRODUCED, Step.TRANSACTION_COMMITTED, Step.COMMIT_APPLIED), 9
)
"""More often than there are partitions: at least one of them has committed in this process."""
CASES = {
    "metering": {Step.FLUSH_BUILT: 9, Step.ROWS_INSERTED: 9} | COMMITTING | TAKE_OVER,
    "billing": {
        Step.INTENT_IN_LEDGER: 5,
        Step.ATTEMPT_IN_LEDGER: 5,
        Step.STRIPE_ANSWERED: 5,
        Step.FLUSH_BUILT: 9,
    }
    | COMMITTING
    | TAKE_OVER,
}
"""Worker -> step -> at which arrival there it dies."""

DEATH_S_MAX = 120
PLACES = [(kind, step) for kind, steps in CASES.items() for step in steps]


stack = own_stack()
"""Every record of its topics is ours."""


@pytest.fixture(scope="module")
def aftermath(stack, tmp_path_factory):
    """Both workers have died everywhere while events flowed; the rest was published to healthy ones.

    How each process ended, and what the books say in the end.
    """
    environment = stack.process_environment() | WORKER_SETTINGS
    folder = tmp_path_factory.mktemp("workers")
    workers = {
        kind: WorkerProcess(kind, environment, folder, METERLINE_WORKER__INSTANCE_ID=f"{kind}-1")
        for kind in CASES
    }
    traffic = Traffic(stack)

    def die_everywhere(kind):
        worker, ends = workers[kind], {}
        for step, times in CASES[kind].items():
            worker.start(die_at=step, times=times)
            ends[kind, step] = worker.wait(DEATH_S_MAX)
        worker.start()
        return ends

    with ended_in_the_end(*workers.values()):
        with traffic.flowing(), ThreadPoolExecutor(len(CASES)) as threads:
            _work_and_die(workers)
            deaths = [threads.submit(die_everywhere, kind) for kind in CASES]
            ends = {place: code for death in deaths for place, code in death.result().items()}
        for worker in workers.values():
            until(worker.is_ready, f"{worker.kind} is ready")
        traffic.publish(500)
        traffic.close()
        yield ends, settle(stack, traffic)


def _work_and_die(workers):
    """First progress: Stripe has accepted a usage record. Then both die wherever they are."""
    for worker in workers.values():
        worker.start()
    billing = workers["billing"]
    accepted = 'meterline_stripe_requests_total{outcome="accepted"}'
    until(lambda: accepted in billing.get("/metrics")[1], "a usage record is accepted")
    for worker in workers.values():
        worker.kill()


def test_every_step_has_a_crash():
    """A step that the code announces and nobody dies at would be a promise without a proof."""
    assert set(Step) == {step for _, step in PLACES}


@pytest.mark.parametrize(("kind", "step"), PLACES)
def test_the_worker_died_there(aftermath, kind, step):
    """By its own SIGKILL, which it sends at the step and nowhere else."""
    ends, _ = aftermath

    assert ends[kind, step] == -signal.SIGKILL


def test_after_all_crashes_the_books_are_exact(aftermath):
    """One offset for each event, counters add up, windows = rows, Stripe = whole credits, no name twice."""
    _, wrong = aftermath

    assert wrong == []
