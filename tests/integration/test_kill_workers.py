"""A billing worker that dies at any named step leaves nothing to repair: everything billed once.

Metering workers die at every step in `test_prove_metering.py`; here one runs beside it.
"""

from __future__ import annotations

import signal

import pytest
from tests.pipeline_books import WORKER_SETTINGS, Traffic, settle
from tests.proof.worker_kills import steps_of
from tests.stacks import own_stack
from tests.worker_nursery import NurseryWorker
from tests.worker_processes import ended_in_the_end, kept_running, until

from meterline import metering
from meterline.streaming.steps import Step

pytestmark = [pytest.mark.stack, pytest.mark.timeout(280)]

TIMES = {
    # The second partition of four: some are taken over, some are not.
    Step.OWNER_FENCED: 2,
    Step.STATE_READ: 2,
    Step.STATE_RESTORED: 2,
    # More often than there are partitions: at least one of them has committed in this process.
    Step.FLUSH_BUILT: 9,
    Step.TRANSACTION_BEGUN: 9,
    Step.TRANSACTION_PRODUCED: 9,
    Step.TRANSACTION_COMMITTED: 9,
    Step.COMMIT_APPLIED: 9,
    Step.INTENT_IN_LEDGER: 5,
    Step.ATTEMPT_IN_LEDGER: 5,
    Step.STRIPE_ANSWERED: 5,
}
"""Step -> at which arrival there it dies."""

stack = own_stack()
"""Every record of its topics is ours."""


@pytest.fixture(scope="module")
def aftermath(stack, tmp_path_factory):
    """It has died everywhere while events flowed; the rest was published to a healthy one.

    How each process ended, and what the books say in the end.
    """
    environment = stack.process_environment() | WORKER_SETTINGS
    folder = tmp_path_factory.mktemp("workers")
    metering, billing = (
        NurseryWorker(kind, environment, folder, METERLINE_WORKER__INSTANCE_ID=f"{kind}-1")
        for kind in ("metering", "billing")
    )
    traffic = Traffic(stack)
    with ended_in_the_end(metering, billing):
        metering.start()
        with kept_running(metering), traffic.flowing():
            _bill_and_die(billing)
            ends = {}
            for step, times in TIMES.items():
                billing.start(die_at=step, times=times)
                ends[step] = billing.wait()
            billing.start()
        until(billing.is_ready, "billing is ready")
        traffic.publish(500)
        traffic.close()
        yield ends, settle(stack, traffic)


def _bill_and_die(billing):
    """First progress: Stripe has accepted a usage record. Then it dies wherever it is."""
    billing.start()
    accepted = 'meterline_stripe_requests_total{outcome="accepted"}'
    until(lambda: accepted in billing.get("/metrics")[1], "a usage record is accepted")
    billing.kill()


def test_every_step_has_a_crash():
    """A step that the code announces and nobody dies at would be a promise without a proof."""
    assert set(Step) == {*TIMES, *steps_of(metering)}


@pytest.mark.parametrize("step", TIMES)
def test_the_worker_died_there(aftermath, step):
    """By its own SIGKILL, which it sends at the step and nowhere else."""
    ends, _ = aftermath

    assert ends[step] == -signal.SIGKILL


def test_after_all_crashes_the_books_are_exact(aftermath):
    """One offset for each event, counters add up, windows = rows, Stripe = whole credits, no name twice."""
    _, wrong = aftermath

    assert wrong == []
