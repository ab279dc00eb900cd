"""The checker of prove-billing can say no: each way to lose, double or misplace credits is told."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from tests.proof import billing_books, billing_checker, billing_evidence
from tests.proof.billing_books import Counted, Evidence, Period, Statement, Step
from tests.proof.billing_checker import judge

MICRO = 1_000_000
HOUR = 3_600_000
STARTS = 0, 100 * HOUR, 200 * HOUR
FIRST, SECOND, OPEN = (Period(at, at + 100 * HOUR, at + 100 * HOUR + 1) for at in STARTS)
RIGHT = "identifiers lost=0 counted_twice=0 windows_lost=0 credit_difference=0.000000 own_invoices_wrong=0"


def step(kind, period, *, window=0, micro=0, name="", value=0, reason=""):
    return Step(kind, "acme", period.start, window, 0, 1, micro, name, value, reason, 0)


def told(name, period, value):
    return Counted(name, "cus_acme", period.start // 1000 + 1, period.start // 1000 + 2, value)


@pytest.fixture
def right():
    """3.4 credits in time, 0.9 more when the invoice took none any more; the carry goes on twice."""
    late = FIRST.end + 5 * HOUR
    return Evidence(
        statements=[
            Statement(HOUR, "acme", 0, 0, 1, 3_400_000),
            Statement(late, "acme", 0, 0, 2, 4_300_000),
        ],
        periods=[FIRST, SECOND, OPEN],
        steps=[
            step("advance", FIRST, micro=3_400_000, name="a", value=3),
            step("record", FIRST, name="a", value=3),
            step("close", FIRST, micro=-400_000, value=3),
            step("advance", SECOND, micro=400_000, reason="carry"),
            step("advance", SECOND, micro=900_000, name="b", value=1, reason="moved"),
            step("record", SECOND, name="b", value=1),
            step("close", SECOND, micro=-300_000, value=1),
            step("advance", OPEN, micro=300_000, reason="carry"),
        ],
        counted=[told("a", FIRST, 3), told("b", SECOND, 1)],
        rejected=[],
        invoices={("cus_acme", FIRST.start): 3, ("cus_acme", SECOND.start): 1},
        customers={"acme": "cus_acme"},
        outage=(-2, -1),
        unit_micro=MICRO,
    )


def test_what_is_right_is_called_right(right):
    assert judge(right).summary == RIGHT
    assert judge(right).is_conserved


def test_a_window_that_nobody_absorbed_is_told_with_its_credits(right):
    more = Statement(OPEN.start + HOUR, "acme", OPEN.start, 0, 3, 7_654_321)
    found = judge(replace(right, statements=[*right.statements, more]))

    assert found.lost_windows == {("acme", OPEN.start): 7_654_321}
    assert found.differences == {("acme", OPEN.start): -7_654_321}


def test_an_identifier_counted_twice_is_told_by_name(right):
    assert judge(replace(right, counted=[*right.counted, told("a", FIRST, 3)])).doubled == {"a": 3}


def test_a_record_that_stripe_never_counted_is_lost(right):
    assert judge(replace(right, counted=right.counted[1:])).lost == {"a": 3}


def test_a_period_is_judged_by_its_own_invoice_although_the_sum_is_right(right):
    """Two units of the first period are charged with the second: conserved, and still wrong."""
    steps = [
        one._replace(micro=-2_400_000, value=1) if one.kind == "close" and one.period_start == 0 else one
        for one in right.steps
    ]
    steps[3] = steps[3]._replace(micro=2_400_000)
    moved = {("cus_acme", FIRST.start): 1, ("cus_acme", SECOND.start): 3}
    found = judge(replace(right, steps=steps, invoices=moved))

    assert found.differences == {}
    assert len(found.invoices) == 1
    assert "the invoice charges 1, of 3.400000 credits" in found.invoices[0]


def test_what_the_outage_kept_from_stripe_excuses_its_own_period_only(right):
    """Not counted in time, settled by the close: allowed where Stripe was away, and only there."""
    steps = [
        one._replace(micro=-3_400_000, value=0) if one.kind == "close" and one.period_start == 0 else one
        for one in right.steps
    ]
    steps[3] = steps[3]._replace(micro=3_400_000)
    steps[1] = steps[1]._replace(recorded_at=FIRST.end - HOUR)
    late = replace(
        right,
        steps=[*steps, step("settled", FIRST, name="a", value=3)],
        counted=[told("b", SECOND, 4)],
        invoices={("cus_acme", FIRST.start): 0, ("cus_acme", SECOND.start): 4},
    )

    assert judge(replace(late, outage=(FIRST.end - HOUR, FIRST.end + HOUR))).is_conserved
    assert [text for text in judge(late).invoices if "charges 0, of 3.400000" in text]


def test_a_carry_that_is_torn_is_a_difference(right):
    torn = [one for one in right.steps if not (one.reason == "carry" and one.period_start == SECOND.start)]

    assert judge(replace(right, steps=torn)).differences == {("acme", SECOND.start): 400_000}


def test_the_checker_shares_no_code_with_the_pipeline():
    for module in (billing_books, billing_checker, billing_evidence):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [name for name in imported if name.startswith("meterline")]
