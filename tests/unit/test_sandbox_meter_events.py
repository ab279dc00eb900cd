"""The rules of meter events on a given state and clock: no server, no disk."""

from __future__ import annotations

import json

import pytest

from meterline.errors import UserError
from meterline.local.sandbox.command import Call
from meterline.local.sandbox.customers import CreateCustomer
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.event_summaries import list_event_summaries
from meterline.local.sandbox.form import Params, decode_form
from meterline.local.sandbox.meter_events import CreateMeterEvent
from meterline.local.sandbox.meters import CreateMeter
from meterline.local.sandbox.state import State

NOW = 1_795_000_020  # a whole minute
DAY_S = 86_400


class Account:
    """A state and the records that made it."""

    def __init__(self, formula="sum"):
        self.state = State()
        self.records = []
        self.customer = self.write(CreateCustomer, "", token="a")["id"]
        self.meter = self.write(
            CreateMeter,
            f"display_name=Credits&event_name=credits&default_aggregation[formula]={formula}",
            token="m",
        )["id"]

    def write(self, command, form, *, now=NOW, token="t", key=""):
        outcome = command.parse(Params(decode_form(form)), "").execute(self.state, Call(now, token, key))
        record = {"at": now, "changes": list(outcome.changes)}
        self.records.append(json.loads(json.dumps(record)))
        self.state.take(record)
        return outcome.body

    def event(self, identifier, value="1", *, timestamp=NOW, now=NOW, customer=None):
        customer = customer or self.customer
        form = f"event_name=credits&payload[stripe_customer_id]={customer}&payload[value]={value}"
        return self.write(
            CreateMeterEvent, f"{form}&identifier={identifier}&timestamp={timestamp}", now=now, key="k"
        )

    def total(self, state=None, *, start=NOW - DAY_S, end=NOW + DAY_S):
        query = Params(decode_form(f"customer={self.customer}&start_time={start}&end_time={end}"))
        data = list_event_summaries(state or self.state, query, self.meter, now=NOW + 40 * DAY_S)["data"]
        return [summary["aggregated_value"] for summary in data]


def test_an_identifier_is_refused_up_to_24_hours_after_it_was_received():
    """The clock that counts is when Stripe received it, not the event's timestamp."""
    account = Account()
    account.event("x", timestamp=NOW - 30 * DAY_S)

    with pytest.raises(StripeError) as refused:
        account.event("x", now=NOW + DAY_S, timestamp=NOW)

    assert refused.value.message == "An event already exists with identifier x."
    assert refused.value.code is None
    assert refused.value.should_retry is False


def test_after_24_hours_the_same_identifier_counts_again():
    """So a sender that resends too late bills twice; the sandbox lets it, as Stripe would."""
    account = Account()
    account.event("x", "5")
    account.event("x", "5", now=NOW + DAY_S + 1)

    assert account.total() == [10.0]


def test_an_identifier_used_again_is_held_for_another_24_hours():
    """The second use starts the time anew."""
    account = Account()
    account.event("x")
    account.event("x", now=NOW + DAY_S + 1, timestamp=NOW)
    account.state.forget(NOW + DAY_S + 2)

    with pytest.raises(StripeError, match="already exists"):
        account.event("x", now=NOW + 2 * DAY_S, timestamp=NOW)


def test_forgetting_drops_exactly_what_is_too_old():
    """Memory holds a day of identifiers, not all there ever were."""
    account = Account()
    account.event("old")
    account.event("young", now=NOW + 10)

    account.state.forget(NOW + DAY_S + 1)

    assert list(account.state.identifiers) == ["young"]


def test_an_event_of_an_unknown_customer_is_received_and_not_counted():
    """Its identifier is held and it waits in the list of later rejections, with its request's key."""
    account = Account()
    account.event("x", customer="cus_nobody")

    (rejection,) = account.state.async_rejections
    assert rejection["code"] == "meter_event_customer_not_found"
    assert rejection["idempotency_key"] == "k"
    assert account.state.usage == {}
    with pytest.raises(StripeError, match="already exists"):
        account.event("x")


def test_sums_do_not_round():
    """Ten tenths are one, and a cent beside a trillion is still there when the trillion goes."""
    account = Account()
    for number in range(10):
        account.event(f"tenth-{number}", "0.1")
    account.event("large", "999999999999999")
    account.event("small", "0.00000000000001")
    account.event("minus", "-999999999999999")

    assert account.total() == [1.00000000000001]


@pytest.mark.parametrize(("formula", "expected"), [("sum", 6.0), ("count", 3.0), ("last", 2.0)])
def test_formulas(formula, expected):
    """`last` goes by timestamp; of one second the one received last counts."""
    account = Account(formula)
    account.event("newest", "3", timestamp=NOW)
    account.event("older", "1", timestamp=NOW - 60)
    account.event("newest-too", "2", timestamp=NOW)

    assert account.total() == [expected]


def test_a_replayed_state_is_the_live_state():
    """Every change goes through the journal's records, so a restart can't come out different."""
    account = Account()
    account.event("x", "5")
    account.event("y", "-2.5", timestamp=NOW - 1)
    account.event("z", customer="cus_nobody")
    replayed = State()
    for record in account.records:
        replayed.take(record)

    assert replayed == account.state


def test_a_change_of_a_later_version_is_refused():
    """Ignoring it would forget money."""
    with pytest.raises(UserError, match="another --state-dir"):
        State().take({"at": NOW, "changes": [{"kind": "credit_note"}]})
