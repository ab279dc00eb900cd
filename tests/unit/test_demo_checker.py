"""The checker can say no: each kind of lost, doubled or stuck money is a problem of its own."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import pytest

from meterline.demo.checker import Checker, ClientAccount, Expected

MICRO = 1_000_000
BEGAN = datetime(2026, 11, 24, 12, tzinfo=UTC)


def account(**changed):
    right = {
        "events": 10,
        "file_micro": 7_500_000,
        "ledger_micro": 7_500_000,
        "windows": 2,
        "windows_micro": 7_500_000,
        "stripe_units": 7,
        "grants_micro": 10_000_000,
        "granted_micro": 10_000_000,
        "consumed_micro": 7_500_000,
    }
    return ClientAccount(**(right | changed))


def held(**changed):
    return account(
        **({"held_micro": 7_500_000, "held_reasons": {"no_customer"}, "stripe_units": 0} | changed)
    )


def problems_of(accounts, *, records=23, dead=None, began=BEGAN, exhausted=()):
    checker = Checker.__new__(Checker)
    expected = Expected(23, dict.fromkeys(accounts, 10), {}, Counter(conflict=1), {}, frozenset(exhausted))
    checker._customers = {"payer": "cus_1", "held": None}
    checker._began = began
    return list(checker._compare(expected, accounts, records, Counter(conflict=1) if dead is None else dead))


def test_what_adds_up_is_no_problem():
    """The remainder below a unit and the credits of a client without customer are where they belong."""
    accounts = {"payer": account(), "held": held()}

    assert problems_of(accounts) == []
    assert tuple(one.remainder_micro for one in accounts.values()) == (500_000, 0)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"events": 9}, "9 events in the ledger, 10 in the input"),
        ({"ledger_micro": 7_500_001, "windows_micro": 7_500_001}, "in the ledger, 7.5 in the input"),
        ({"windows_micro": 6_500_000}, "6.5 credits in closed windows, 7.5 in the ledger"),
        ({"stripe_units": 8}, "Stripe counts 8 units for 7.5 credits"),
        ({"stripe_units": 6}, "Stripe counts 6 units for 7.5 credits"),
        ({"stripe_units": 0}, "Stripe counts no unit"),
        ({"granted_micro": 9_000_000}, "9 credits in its bucket, 10 granted"),
        ({"consumed_micro": 7_400_000}, "7.4 credits charged, 7.5 in the ledger"),
        ({"undecided_micro": 1}, "0.000001 credits are reserved or not yet charged"),
        ({"grants_micro": 7_000_000, "granted_micro": 7_000_000}, "0.5 credits more were used than granted"),
        ({"alerts": 1}, "alerted 1 times, expected 0"),
        ({"in_flight": 1}, "1 usage records have no final answer"),
        ({"held_micro": 1, "held_reasons": {"unverified"}}, "held for ['unverified']"),
    ],
)
def test_a_difference_is_named(changed, text):
    """One wrong figure is one problem with the client's name."""
    found = problems_of({"payer": account(**changed), "held": held()})

    assert any(text in problem and problem.startswith("payer:") for problem in found), found


@pytest.mark.parametrize("alerts", [0, 2])
def test_who_was_refused_is_alerted_once(alerts):
    """Not never, and not twice."""
    accounts = {"payer": account(alerts=alerts), "held": held()}

    assert problems_of(accounts, exhausted=["payer"]) == [f"payer: alerted {alerts} times, expected 1"]
    assert problems_of({"payer": account(alerts=1), "held": held()}, exhausted=["payer"]) == []


@pytest.mark.parametrize("changed", [{"held_micro": 7_000_000}, {"held_reasons": {"no_customer", "refused"}}])
def test_only_the_expected_hold_is_right(changed):
    """All of the client without a customer, for that reason alone."""
    assert problems_of({"payer": account(), "held": held(**changed)})


def test_records_and_dead_letters_must_match():
    """What Kafka holds is what was published; what was refused is what should be."""
    accounts = {"payer": account(), "held": held()}

    assert problems_of(accounts, records=22) == ["Kafka has 22 records of this run, the input has 23"]
    assert len(problems_of(accounts, dead=Counter())) == 1


def test_a_second_period_may_keep_a_second_remainder():
    """A run around midnight of the first touches two invoices, each with its own floor."""
    accounts = {"payer": account(stripe_units=6), "held": held()}

    assert problems_of(accounts)
    assert problems_of(accounts, began=datetime(2026, 12, 1, 0, 20, tzinfo=UTC)) == []
