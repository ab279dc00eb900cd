"""The proof of billing in short: workers die at every step, Stripe does its worst, each invoice is right."""

from __future__ import annotations

import re

import pytest
from tests.proof.worker_kills import ANYWHERE, TAKE_OVER, steps_of
from tests.proof_in_short import said_by_proof

from meterline import billing, metering
from meterline.local.sandbox.faults import Action
from meterline.streaming.steps import Step

RUN_S_MAX = 400

pytestmark = [pytest.mark.stack, pytest.mark.timeout(RUN_S_MAX + 20)]


def test_every_step_has_a_crash():
    """A step that the code announces and nobody dies at would be a promise without a proof."""
    assert set(Step) == {*steps_of(billing), *steps_of(metering)}


def test_each_invoice_is_right_whatever_is_killed():
    """`python -m tests.proof.billing` with three weeks of few clients; what is planted is found, exactly."""
    short = ["--clients", "6", "--windows", "12", "--kills", "18", "--period", "week", "--minutes", "5"]
    said = said_by_proof("billing", *short, seconds=RUN_S_MAX)

    counts = dict(re.findall(r"^  (\S+) (\d+)$", said, re.MULTILINE))
    assert counts.keys() == {*steps_of(billing), ANYWHERE, TAKE_OVER, *Action}
    assert min(map(int, counts.values())) > 0
    nothing = "lost=0 counted_twice=0 windows_lost=0 credit_difference=0.000000 own_invoices_wrong=0"
    assert f"\nidentifiers {nothing}\n" in said
    assert "\nplanted and reported exactly: identifiers lost=0 counted_twice=1 windows_lost=1 " in said
