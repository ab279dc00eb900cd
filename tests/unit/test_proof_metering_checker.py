"""The proof's checker can say no: each way to lose, double or misplace credits is told with its amount."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from tests.proof import metering_books, metering_checker, metering_evidence
from tests.proof.metering_books import COPY, EVENT, POISON, Amount, Evidence, Line, Row, Snapshot, Total
from tests.proof.metering_checker import judge
from tests.proof.worker_kills import AT_START, Kill, plan_kills, steps_of

from meterline import metering
from meterline.streaming.steps import Step

MICRO = 1_000_000
LENGTH = 5_000
NOON = 1_795_521_600_000
RIGHT = "lost=0 duplicated=0 credit_difference=0"


def line(number, micro=3 * MICRO, client="acme", **changed):
    whole = Line(
        EVENT, f"e{number}", client, f"task-{number}", "gpu", micro, billable=True, occurred_at=NOON + number
    )
    return whole._replace(**changed)


def row(of, offset, partition=0, **changed):
    whole = Row(
        partition, offset, of.event_id, of.client_id, of.correlation_id, of.sku, of.micro, of.billable,
        of.occurred_at,
    )  # fmt: skip
    return whole._replace(**changed)


@pytest.fixture
def right():
    """Two events of acme in one window, a free one of another client; a copy, a retried task, poison."""
    lines = [line(0), line(1, 2 * MICRO), line(2, 5 * MICRO, "umbrella", billable=False)]
    trouble = [
        lines[0]._replace(kind=COPY),
        lines[1]._replace(kind=COPY, occurred_at=NOON + 60_000),
        line(3, kind=POISON, reason="undecodable"),
    ]
    acme, umbrella = Amount(2, 5 * MICRO), Amount(0, 0, 1, 5 * MICRO)
    return Evidence(
        lines=lines + trouble,
        rows=[row(lines[0], 0), row(lines[1], 1), row(lines[2], 0, partition=1)],
        snapshots=[
            Snapshot("acme", NOON, 0, 0, {"gpu": Amount(1, 3 * MICRO)}),
            Snapshot("acme", NOON, 0, 4, {"gpu": acme}),
            Snapshot("umbrella", NOON, 1, 0, {"gpu": umbrella}),
        ],
        totals=[Total("acme", 0, 1, acme), Total("umbrella", 1, 0, umbrella)],
        dead=["undecodable"],
        records=6,
        window_ms=LENGTH,
    )


def found(evidence):
    verdict = judge(evidence)
    return verdict.summary, list(verdict.details())


def test_what_adds_up_is_conserved(right):
    """Copies and poison are counted nowhere; of a window the highest cutoff counts."""
    verdict = judge(right)

    assert (verdict.is_conserved, verdict.summary) == (True, RIGHT)
    assert list(verdict.details()) == []
    assert verdict.counts == {"events": 3, "copies": 2, "dead": 1, "snapshots": 3, "totals": 2}


def test_an_event_that_is_nowhere_is_lost(right):
    """Reported with its id, and its credits missing in the book that lacks it."""
    summary, details = found(replace(right, rows=[right.rows[0], right.rows[2]]))

    assert summary == "lost=1 duplicated=0 credit_difference=2"
    assert details[:2] == ["lost: 2 credits, e1", "ledger: 2 credits differ"]


def test_an_event_at_two_offsets_is_duplicated(right):
    """Also in another partition; reported with its id and the credits that are too many."""
    twin = row(right.lines[0], 7, partition=3)
    summary, details = found(replace(right, rows=[*right.rows, twin]))

    assert summary == "lost=0 duplicated=1 credit_difference=3"
    assert details[:2] == ["duplicated: 3 credits, e0", "ledger: 3 credits differ"]


def test_a_window_and_a_total_that_lag_are_differences(right):
    """Each book stands for itself: the rows are right, what was told is not."""
    windows = found(replace(right, snapshots=[right.snapshots[0], right.snapshots[2]]))
    totals = found(replace(right, totals=right.totals[1:]))

    assert windows[0] == "lost=0 duplicated=0 credit_difference=2"
    assert totals[0] == "lost=0 duplicated=0 credit_difference=5"
    assert (windows[1][0], totals[1][0]) == ("windows: 2 credits differ", "totals: 5 credits differ")


def test_too_much_here_and_too_little_there_is_no_zero(right):
    """Differences of several entries do not cancel out."""
    moved = [
        Total("acme", 0, 1, Amount(2, 4 * MICRO)),
        Total("umbrella", 1, 0, Amount(0, 0, 1, 6 * MICRO)),
    ]

    assert found(replace(right, totals=moved))[0] == "lost=0 duplicated=0 credit_difference=2"


def test_free_usage_is_no_billed_usage(right):
    """The same credits, but the client would pay: a difference both ways."""
    billed = [right.totals[0], Total("umbrella", 1, 0, Amount(1, 5 * MICRO))]

    assert found(replace(right, totals=billed))[0] == "lost=0 duplicated=0 credit_difference=10"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda e: {"rows": [e.rows[0]._replace(micro=MICRO), *e.rows[1:]]}, "1 rows say something else"),
        (lambda e: {"rows": [*e.rows, row(line(9, 0), 8, 1)]}, "1 rows of events nobody published: e9"),
        (lambda e: {"rows": [e.rows[0], e.rows[0]._replace(micro=1), *e.rows[1:]]}, "1 rows contradict"),
        (lambda _: {"dead": []}, "dead letters are {}, the input has {'undecodable': 1}"),
        (lambda _: {"records": 7}, "the log holds 7 records, the input has 6 lines"),
        (
            lambda e: {"snapshots": [*e.snapshots, Snapshot("acme", NOON, 0, 0, {"gpu": Amount(1, 4)})]},
            "window ('acme', 1795521600000, 0) says two things as of 0",
        ),
        (
            lambda e: {"totals": [*e.totals, Total("acme", 0, 1, Amount(2, 4))]},
            "the total ('acme', 0) says two things as of 1",
        ),
        (
            lambda e: {"totals": [Total("acme", 0, 1, Amount(3, 5 * MICRO)), e.totals[1]]},
            "totals: 1 counts differ",
        ),
    ],
)
def test_whatever_else_is_wrong_is_a_problem(right, changed, problem):
    """Altered, invented and contradictory rows and statements, dead letters, and the length of the log."""
    verdict = judge(replace(right, **changed(right)))

    assert not verdict.is_conserved
    assert any(problem in text for text in verdict.details()), list(verdict.details())


def test_the_checker_shares_no_code_with_the_product():
    """A checker of money imports nothing of what it checks, not even its names."""
    for module in (metering_books, metering_checker, metering_evidence):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [
            name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
        ]
        assert not [name for name in imported if name.startswith("meterline")]


def test_kills_fall_on_every_step_of_a_metering_worker():
    """Found in the code that announces them: a step that is added is killed at, too."""
    billings = {Step.INTENT_IN_LEDGER, Step.ATTEMPT_IN_LEDGER, Step.STRIPE_ANSWERED}
    steps = steps_of(metering)
    plan = plan_kills(20, 1, steps)

    assert set(steps_of(metering)) == set(Step) - billings
    assert {kill.at for kill in plan} >= set(steps_of(metering))
    assert len(plan) == 20
    assert all(kill.times > len(AT_START) for kill in plan if kill.at in set(steps_of(metering)) - AT_START)
    assert plan == plan_kills(20, 1, steps) != plan_kills(20, 2, steps)
    assert isinstance(plan[0], Kill)
