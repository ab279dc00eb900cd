"""Which of several copies stands, and that the event that takes one back is made of its place alone."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from meterline.cli.audit import app as audit
from meterline.domain.events import CorrectionKind, check_event, payload_digest
from meterline.domain.twins import Copy, judge_copies, twin_correction

COPY = Copy("acme", "e1", 1_000, "topic", 0, 7, 11, "task", "gpu", 5_000_000, True, 900, False)  # noqa: FBT003 - a row


def places(copies):
    return [(copy.appended_at, copy.partition, copy.offset) for copy in copies]


def test_the_first_by_append_time_partition_and_offset_stands():
    """In whatever order the ledger gives them: every audit takes back the same copies."""
    copies = [
        COPY._replace(appended_at=2_000, offset=1),
        COPY,
        COPY._replace(partition=1, offset=3),
        COPY._replace(offset=9),
    ]

    verdicts = [judge_copies(order) for order in permutations(copies)]

    assert {places([verdict.first])[0] for verdict in verdicts} == {(1_000, 0, 7)}
    assert {tuple(places(verdict.twins)) for verdict in verdicts} == {
        ((1_000, 0, 9), (1_000, 1, 3), (2_000, 0, 1))
    }


def test_another_payload_is_a_conflict_and_its_own_copies_are_twins():
    """No program says which amount is right; that the second one was counted twice is certain."""
    other = COPY._replace(partition=1, payload_digest=12)
    again = COPY._replace(partition=2, payload_digest=12)

    verdict = judge_copies([again, COPY, other])

    assert ([other], [again]) == (verdict.conflicts, verdict.twins)


def test_a_copy_that_a_correction_names_is_settled():
    """A twin by its correction, a conflict by a person's: neither is taken back again."""
    twin = COPY._replace(offset=8, is_corrected=True)
    conflict = COPY._replace(offset=9, payload_digest=12, is_corrected=True)

    verdict = judge_copies([COPY, twin, conflict])

    assert ([], [], [twin]) == (verdict.twins, verdict.conflicts, verdict.reversed_before)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 2)), min_size=1, unique=True))
def test_what_is_left_of_an_event_is_one_copy_of_each_payload(facts):
    """After the twins' corrections each payload is charged once, and only one without a conflict."""
    copies = [
        COPY._replace(appended_at=at, partition=p, payload_digest=digest, credits_micro=digest)
        for at, p, digest in facts
    ]
    verdict = judge_copies(copies)
    corrections = [twin_correction(copy) for copy in verdict.twins]

    left = sum(copy.credits_micro for copy in copies) + sum(one.credits_micro for one in corrections)
    payloads = {copy.payload_digest for copy in copies}
    assert sum(payloads) == left
    assert len(payloads) - 1 == len(verdict.conflicts)


def test_a_correction_is_accepted_and_takes_back_what_the_copy_cost():
    """Same client, SKU, time and billable; negative credits, which only a correction may have."""
    event = twin_correction(COPY)
    check_event(event, appended_at=10**12)

    assert (event.client_id, event.sku, event.occurred_at, event.billable) == ("acme", "gpu", 900, True)
    assert event.credits_micro == -5_000_000
    assert event.corrects == ("e1", CorrectionKind.TWIN, "topic", 0, 7)
    assert event == twin_correction(COPY)


def test_a_correction_that_was_counted_twice_is_taken_back_like_any_event():
    """Two audits more than a horizon apart: the reversal of the reversal gives back what was too much."""
    first = twin_correction(COPY)
    copies = [
        COPY._replace(
            event_id=first.event_id,
            offset=offset,
            credits_micro=first.credits_micro,
            payload_digest=payload_digest(first),
        )
        for offset in (20, 30)
    ]
    (again,) = judge_copies(copies).twins
    second = twin_correction(again)

    assert (second.corrects.offset, second.credits_micro) == (30, 5_000_000)
    assert first.event_id != second.event_id


def test_the_audit_is_a_group_of_commands():
    """`meterline audit twins`: a group of one command would be called without its name."""
    assert audit.registered_callback is not None
