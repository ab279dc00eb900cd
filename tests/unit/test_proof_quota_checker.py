"""The proof's checker can say no: each way to lose, double or strand credits is a problem with its amount."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from tests.proof import quota_books, quota_checker, quota_evidence
from tests.proof.quota_books import BucketNow, Event, Evidence, Sample, TaskBook
from tests.proof.quota_checker import judge, judge_finished

MICRO = 1_000_000
NOON = 1_795_521_600_000
TTL_MS = 10_000


class Story:
    """Tasks of one client, told second by second; everything that follows from it is right."""

    def __init__(self, granted=100):
        self.lines = []
        self.log = []
        self.granted = [(NOON - 1_000, granted * MICRO)]
        self.dead = {}

    def at(self, second, do, **facts):
        self.lines.append({"at": NOON + second * 1_000, "do": do, **facts})

    def granted_to(self, rid, amount, second=0, ttl_ms=TTL_MS):
        self.at(second, "ask", rid=rid, task=rid, micro=amount * MICRO)
        until = NOON + second * 1_000 + ttl_ms
        self.at(second, "granted", rid=rid, micro=amount * MICRO, until=until)

    def worked(self, event_id, amount, rid, second=1):
        self.at(second, "work", rid=rid, task=rid, event=event_id, sku="gpu", micro=amount * MICRO)

    def appended(self, event_id, amount, rid, second=2):
        offset = len(self.log)
        appended_at = NOON + second * 1_000
        self.log.append(Event(0, offset, appended_at, event_id, "gpu", amount * MICRO, rid))
        return offset

    def used(self, rid, amount, *, reserved=None, second=0, appended=2):
        """A whole task: reserved, worked, published."""
        self.granted_to(rid, amount if reserved is None else reserved, second)
        self.worked(f"{rid}/0", amount, rid, second + 1)
        self.appended(f"{rid}/0", amount, rid, appended)

    def evidence(self, **changed):
        first = {}
        for event in self.log:
            first.setdefault(event.event_id, event)
        rows = {(event.partition, event.offset): (event.event_id, event.micro) for event in first.values()}
        consumed = sum(micro for _, micro in rows.values())
        granted = sum(micro for _, micro in self.granted)
        right = {
            "tasks": TaskBook(self.lines),
            "log": self.log,
            "granted": self.granted,
            "totals": consumed,
            "ledger": rows,
            "dead": self.dead,
            "bucket": BucketNow(granted, consumed, 0, 0),
        }
        return Evidence(**(right | changed))


@pytest.fixture
def story():
    """Two tasks, 60 of 100 credits, and copies that change nothing."""
    told = Story()
    told.used("a:1", 20)
    told.used("b:1", 40)
    told.appended("b:1/0", 40, "b:2", 3)
    told.dead[0, told.appended("a:1/0", 7, "a:1", 3)] = "conflict"
    return told


def problems_of(evidence, **expected):
    return judge(evidence, **expected).problems


def test_what_adds_up_is_conserved(story):
    """A second copy and a contradicting one are counted nowhere."""
    verdict = judge(story.evidence())

    assert verdict.problems == []
    assert verdict.summary.startswith("quota: conserved (granted=100 work=60 accepted=60 overshoot=0 late=0 ")


def test_oversell_is_reported_with_its_amount():
    """Reserved by everybody's own word, and yet 30 credits more than granted."""
    story = Story()
    story.used("a:1", 60)
    story.used("b:1", 70)

    problems = problems_of(story.evidence())

    assert any(problem.startswith("oversold by 30 credits: at offset 1") for problem in problems), problems
    assert any(problem.startswith("30 credits of work were done above the bound") for problem in problems)


def test_oversell_counts_at_every_instant():
    """A grant that comes later doesn't excuse what was accepted before it."""
    story = Story()
    story.used("a:1", 60)
    story.used("b:1", 70)
    story.granted.append((NOON + 60_000, 100 * MICRO))

    assert any(problem.startswith("oversold by 30 credits") for problem in problems_of(story.evidence()))


def test_late_work_is_the_first_term():
    """Appended after its deadline: in full, and only where tasks may outlive their reservations."""
    story = Story()
    story.used("a:1", 90, appended=11)
    story.used("b:1", 60, second=9, appended=12)

    verdict = judge(story.evidence(), terms_expected=True)

    assert verdict.problems == []
    assert (verdict.overshoot, verdict.terms.late) == (50 * MICRO, 90 * MICRO)
    assert any("every term of the bound must be 0" in problem for problem in problems_of(story.evidence()))


def test_a_renewed_hold_is_not_late():
    """Its deadline is the newest it had been told when the event was appended."""
    story = Story()
    story.used("a:1", 90, appended=11)
    story.at(8, "renewed", rid="a:1", until=NOON + 18_000)

    assert judge(story.evidence()).terms.sum == 0


@pytest.mark.parametrize("ended", [{"do": "void"}, {"do": "settle", "parts": [], "final": True}])
def test_what_was_given_back_covers_nothing(ended):
    """After a void or the last settle the hold is gone, whatever its deadline."""
    story = Story()
    story.used("a:1", 90, appended=5)
    story.at(4, rid="a:1", **ended)

    assert judge(story.evidence()).terms.late == 90 * MICRO


def test_more_than_reserved_is_the_second_term():
    """What was appended or settled before under the same reservation is used up."""
    story = Story()
    story.used("a:1", 30, reserved=50)
    story.at(3, "settle", rid="a:1", parts=[[0, 0, 30 * MICRO]], final=False)
    story.worked("a:1/1", 45, "a:1", 4)
    story.appended("a:1/1", 45, "a:1", 5)

    verdict = judge(story.evidence(), terms_expected=True)

    assert (verdict.problems, verdict.terms.above) == ([], 25 * MICRO)


@pytest.mark.parametrize("rid", [None, "never-granted"])
def test_no_reservation_is_the_third_term(rid):
    """No id, or one that nobody was granted."""
    story = Story()
    story.worked("a/0", 30, rid)
    story.appended("a/0", 30, rid)

    assert judge(story.evidence()).terms.unreserved == 30 * MICRO


def test_a_lapsed_lease_is_the_fourth_term():
    """At most what it ever held, once; the lease of a holder that was killed excuses nothing."""
    story = Story()
    story.used("a:1", 60)
    story.used("b:1", 70)
    bucket = BucketNow(100 * MICRO, 130 * MICRO, 0, 0, lapsed_leases=["l", "killed"])

    def problems(held):
        holds = {"l": held * MICRO, "killed": 20 * MICRO, "other": 500 * MICRO}
        evidence = story.evidence(bucket=bucket, lease_holds=holds, stalls=1)
        return problems_of(evidence, terms_expected=True)

    assert problems(30) == []
    assert any(problem.startswith("oversold by 1 credits") for problem in problems(29))


@pytest.mark.parametrize(
    ("bucket", "text"),
    [
        (
            BucketNow(100, 60, 5, 0, [("key 9:5000000", 5)]),
            "leak: 5 credits are still provisional, 1 e",
        ),
        (
            BucketNow(100, 60, 0, 7, held={"a:1": 7}),
            "7 credits are still reserved, 1 reservations: a:1",
        ),
        (BucketNow(100, 60, 5, 0), "leak: the bucket says 5 provisional, its entries sum up to 0"),
        (BucketNow(100, 60, 0, 0, held={"a:1": 7}), "its entries sum up to 7, 7 credits differ"),
        (BucketNow(112, 60, 0, 0), "the bucket says granted 112, expected 100: 12 credits too much"),
        (BucketNow(100, 59, 0, 0), "the bucket says consumed 59, expected 60: 1 credits too little"),
    ],
)
def test_what_is_left_or_wrong_in_the_bucket_is_reported(story, bucket, text):
    """Provisional, reserved, stranded: with its amount."""
    in_micro = BucketNow(
        *(amount * MICRO for amount in bucket[:4]),
        [(key, micro * MICRO) for key, micro in bucket.provisional_entries],
        {rid: micro * MICRO for rid, micro in bucket.held.items()},
    )
    problems = problems_of(story.evidence(bucket=in_micro))

    assert any(text in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"totals": 59 * MICRO}, "usage.totals say 59, expected 60: 1 credits too little"),
        ({"ledger": {(0, 0): ("a:1/0", 20 * MICRO)}}, "the ledger lacks 1 accepted events and has 0 others"),
        ({"ledger": {}}, "the ledger sums up to 0, expected 60: 60 credits too little"),
        ({"dead": {}}, "expected 1 conflicts"),
        (
            {"samples": [Sample(NOON, -9 * MICRO, 5), Sample(NOON + 1, -1, -2 * MICRO)]},
            "had 2 credits consumed",
        ),
    ],
)
def test_each_source_must_say_the_same(story, changed, text):
    """Totals, ledger, dead letters, and what was seen from the side."""
    problems = problems_of(story.evidence(**changed))

    assert any(text in problem for problem in problems), problems


def test_work_that_never_reached_the_log_is_reported(story):
    """And events that nobody worked for, and those that cost something else."""
    story.worked("c/0", 3, "c:1")
    story.appended("d/0", 4, "d:1", 4)
    story.worked("e/0", 5, "e:1")
    story.appended("e/0", 6, "e:1", 4)

    problems = "\n".join(problems_of(story.evidence(), terms_expected=True))

    assert "1 units of work, 3 credits, never reached the log: c/0" in problems
    assert "the log has 1 events, 4 credits, that nobody did: d/0" in problems
    assert "1 events cost something else than the work: e/0" in problems


def test_finished_tasks_are_in_the_ledger_once(story):
    """Missing, twice, or with other credits: each is told."""
    evidence = story.evidence()
    finished = {"a:1/0": 20 * MICRO, "b:1/0": 40 * MICRO}
    twice = replace(evidence, ledger=evidence.ledger | {(1, 7): ("a:1/0", 20 * MICRO)})

    assert judge_finished(evidence, finished).problems == []
    assert "1 finished events are not in the ledger once: c" in judge_finished(evidence, {"c": 1}).problems
    assert "1 finished events are not in the ledger once: a:1/0" in judge_finished(twice, finished).problems
    wrong = judge_finished(evidence, {"a:1/0": 21 * MICRO}).problems
    assert "1 finished events are in the ledger with other credits: a:1/0" in wrong


@pytest.mark.parametrize("module", [quota_books, quota_checker, quota_evidence])
def test_the_checker_shares_no_code_with_the_product(module):
    """Neither by import nor by what it imports."""
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)

    assert not [name for name in imported if name.startswith("meterline")]
    assert {name for name in imported if name.startswith("tests")} <= {
        "tests.proof.quota_books",
        "tests.proof.task_log",
    }
