"""What a client was given: the fold over credit.grants, its records and rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import alert_from_record, alert_to_record, grant_from_record, grant_to_record
from meterline.domain.alerts import CreditAlert, alert_id, levels_reached
from meterline.domain.buckets import Bucket, BucketBalance, Shard
from meterline.domain.clients import Client
from meterline.domain.grants import (
    BaselinePart,
    ClientGrants,
    CreditGrant,
    GrantKind,
    GrantOutcome,
    baseline_id,
    check_grant,
)
from meterline.errors import DeadLetterError
from meterline.ledger.tables import CREDIT_GRANT_LOG_COLUMNS
from meterline.quota.grants import GrantBook, grant_op
from meterline.quota.rows import GrantRow, grant_columns

PREPAID, BUDGET, BASELINE = GrantKind.PREPAID, GrantKind.BUDGET, GrantKind.BASELINE


def grant(grant_id, kind=PREPAID, amount=10, start=None, base=()):
    end = start + 100 if kind is BASELINE else None
    return CreditGrant(grant_id, "acme", kind, amount, 1, "test", "why", start, end, base)


GRANTS = st.one_of(
    st.builds(grant, st.sampled_from("abcdef"), st.just(PREPAID), st.integers(1, 50)),
    st.builds(grant, st.sampled_from("uvwxyz"), st.just(BUDGET), st.integers(0, 50), st.integers(0, 5)),
    st.integers(0, 5).flatmap(
        lambda start: st.builds(
            grant,
            st.just(baseline_id("acme", start)),
            st.just(BASELINE),
            st.integers(0, 50),
            st.just(start),
            st.integers(0, 9).map(lambda life: (BaselinePart("t", 0, 1, life),)),
        )
    ),
)


def told(bucket, ops):
    for op in ops:
        bucket.apply(op, 0)
    return (bucket.granted, bucket.base, bucket.period_start)


@given(st.lists(GRANTS, max_size=20))
def test_a_rebuilt_bucket_is_the_live_one(log):
    """Told what stands, an empty bucket becomes what the live one became record by record."""
    shard = Shard()
    shard.begin(1, partitions=1, topic_id="t", skew_ms=0)
    live, rebuilt, grants = Bucket(shard), Bucket(shard), ClientGrants()
    for one in log:
        if grants.take(one) is GrantOutcome.APPLIED and (op := grant_op(one)):
            live.apply(op, 0)

    assert told(rebuilt, map(grant_op, grants.standing())) == told(live, [])


@given(st.lists(GRANTS, max_size=12), st.lists(st.integers(1, 4), max_size=12))
def test_the_book_tells_the_same_however_the_log_is_cut(log, cuts):
    """Told in between or all at the end, with a lost Redis anywhere."""
    shard = Shard()
    shard.begin(1, partitions=1, topic_id="t", skew_ms=0)
    at_once, in_pieces = Bucket(shard), Bucket(shard)
    whole, pieces = GrantBook(Client), GrantBook(Client)
    for one in log:
        whole.take(one)
    for number, one in enumerate(log):
        pieces.take(one)
        if number in cuts:
            in_pieces = Bucket(shard)
            pieces.forget_told()
        if number % 2:
            tell(pieces, in_pieces)

    assert tell(pieces, in_pieces) == tell(whole, at_once)


def tell(book, bucket):
    calls = book.untold(10)
    result = told(bucket, [op for _, ops in calls for op in ops])
    book.told(calls)
    assert book.is_all_told
    return result


def test_a_copy_and_an_earlier_period_do_nothing():
    """The first in the log wins."""
    grants = ClientGrants()
    log = [
        grant("a"),
        grant("a", amount=99),
        grant("b5", BASELINE, start=5),
        grant("b5", BASELINE, start=5),
        grant("other", BASELINE, start=5),
        grant("b4", BASELINE, start=4),
    ]

    applied, known, older = GrantOutcome.APPLIED, GrantOutcome.KNOWN, GrantOutcome.OLDER_PERIOD
    assert [grants.take(one) for one in log] == [applied, known, applied, known, older, older]


def test_the_latest_budget_rules_and_of_equals_the_last_said():
    """A budget for later periods waits for them."""
    grants = ClientGrants()
    for grant_id, start in (("early", 1), ("late", 9), ("middle", 3), ("middle again", 3)):
        grants.take(grant(grant_id, BUDGET, start=start))

    assert grants.budget_for(0) is None
    assert [grants.budget_for(at).grant_id for at in (1, 2, 3, 8, 9)] == [
        "early",
        "early",
        "middle again",
        "middle again",
        "late",
    ]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (grant(""), "grant_id"),
        (grant("x" * 201), "grant_id"),
        (replace(grant("a"), client_id=""), "client_id"),
        (grant("a", amount=0), "prepaid grant must have 1"),
        (grant("a", BUDGET, -1, 5), "budget grant must have 0"),
        (grant("a", amount=2**53), "prepaid grant must have 1"),
        (grant("a", BUDGET), "period_start"),
        (grant("a", start=5), "period_start"),
        (replace(grant("a", BASELINE, start=5), period_end=None), "period_end"),
        (replace(grant("a", BUDGET, start=5), period_end=7), "period_end"),
        (replace(grant("a"), base=(BaselinePart("t", 0, 0, 0),)), "base"),
    ],
)
def test_a_grant_that_breaks_a_rule_is_refused(wrong, field):
    """By whoever writes it, and by the quota worker: other programs write the topic, too."""
    with pytest.raises(ValueError, match=field):
        check_grant(wrong)
    with pytest.raises(DeadLetterError, match=field):
        grant_from_record(grant_to_record(wrong))


@settings(deadline=None)  # the first example compiles the schema
@given(GRANTS)
def test_a_grant_survives_its_record(one):
    codec = RecordCodec("credit-grant")

    assert grant_from_record(codec.decode(codec.encode(grant_to_record(one)))) == one


def test_an_alert_survives_its_record():
    codec = RecordCodec("credit-alert")
    for start in (None, 5):
        alert = CreditAlert(alert_id("acme", 80, "e"), "acme", 80, start, 1, 2, 3, 4, -9, 6)

        assert alert_from_record(codec.decode(codec.encode(alert_to_record(alert)))) == alert


def test_a_row_has_every_column():
    """Of each kind of grant; no period is 0."""
    base = (BaselinePart("t", 1, 8, 70), BaselinePart("t", 2, 9, -3))
    rows = [
        GrantRow(0, 5, 99, grant("a"), GrantOutcome.APPLIED),
        GrantRow(1, 6, 99, grant("b", BASELINE, 40, 500, base), GrantOutcome.OLDER_PERIOD),
    ]

    columns = dict(zip(CREDIT_GRANT_LOG_COLUMNS, grant_columns("log", rows), strict=True))
    assert columns["period_start"] == [0, 500]
    assert columns["base_credits_micro"] == [[], [70, -3]]
    assert columns["outcome"] == ["applied", "older_period"]


@pytest.mark.parametrize(
    ("balance", "refused", "reached"),
    [
        ((100, 79, 0, 0), False, []),
        ((100, 70, 10, 0), False, [80]),
        ((100, 80, 0, 20), False, [80]),
        ((100, 80, 0, 20), True, [80, 100]),
        ((100, 80, 0, 19), True, [80]),
        ((100, 98, 0, 0), True, [80, 100]),
        ((100, 100, 0, 0), False, [80, 100]),
        ((100, 150, 0, 0), False, [80, 100]),
        ((0, 50, 0, 0), True, []),
    ],
)
def test_levels(balance, refused, reached):
    """Used is what is charged and provisional, not held. Refused and nothing to come back: exhausted."""
    granted, consumed, provisional, reserved = balance
    left = granted - consumed - provisional - reserved
    found = BucketBalance(
        granted, consumed, provisional, reserved, left, open=True, generation=1, period_start=None
    )

    assert levels_reached((80,), found, refused=refused) == reached
