"""When usage reaches an invoice: Stripe's documented rules of periods, drafts, grace and finalization.

Plain HTTP against a sandbox process whose clock stands; each test has a customer, a meter and a subscription
of its own, and moves the time.
"""

from __future__ import annotations

import signal
from datetime import UTC, datetime

import pytest
from tests.sandbox_account import DAY_S, HOUR_S, MINUTE_S, Account, SandboxClient

from meterline.local.sandbox.process import SandboxProcess

pytestmark = pytest.mark.stack

START = "2026-01-31T10:00:00Z"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with SandboxProcess.start(tmp_path_factory.mktemp("sandbox"), clock=START) as running:
        yield SandboxClient(running.url)


@pytest.fixture
def account(sandbox):
    return Account(sandbox).subscribe()


def test_a_period_that_ends_leaves_a_draft_with_its_usage(account):
    """The draft is of the period, its lines name the service period, and the next period has begun."""
    start, end = account.period()
    account.use("in", "7", timestamp=start)
    account.client.advance_to(end)
    (draft,) = account.invoices()
    line = draft["lines"]["data"][0]

    assert (draft["status"], draft["created"]) == ("draft", end)
    assert (draft["period_start"], draft["period_end"]) == (start, end)
    assert line["period"] == {"start": start, "end": end}
    assert (line["quantity"], line["quantity_decimal"], line["amount"], draft["total"]) == (7, "7", 7, 7)
    assert draft["parent"]["subscription_details"]["subscription"] == account.subscription
    assert account.period()[0] == end
    assert (
        account.client.get(f"/v1/subscriptions/{account.subscription}").body["latest_invoice"] == draft["id"]
    )


def test_an_invoice_is_final_one_hour_after_its_period_by_default(account):
    """A draft up to the last second of the grace period, then numbered and fixed."""
    _, end = account.period()
    account.client.advance_to(end + HOUR_S - 1)
    (before,) = account.invoices()
    account.client.advance(1)
    (after,) = account.invoices()

    assert (before["status"], before["automatically_finalizes_at"]) == ("draft", end + HOUR_S)
    assert (after["status"], after["status_transitions"]["finalized_at"]) == ("paid", end + HOUR_S)
    assert before["number"] is None
    assert after["number"].endswith("-0002")


def test_the_grace_period_can_be_72_hours_and_no_longer(account):
    """The account's setting, for the drafts made from then on."""
    refused = account.client.post_json("/_sandbox/rules", {"invoice_grace_s": 72 * HOUR_S + 1})
    account.client.control("rules", invoice_grace_s=72 * HOUR_S)
    try:
        _, end = account.period()
        account.client.advance_to(end + 72 * HOUR_S - 1)
        (before,) = account.invoices()
        account.client.advance(1)
        (after,) = account.invoices()
    finally:
        account.client.control("rules", invoice_grace_s=HOUR_S)

    assert refused.status == 400
    assert (before["status"], after["status"]) == ("draft", "paid")


def test_the_grace_period_is_shorter_than_the_service_period(account):
    """A day's subscription can't wait for 24 hours."""
    price = account.price(interval="day")
    account.client.control("rules", invoice_grace_s=24 * HOUR_S)
    try:
        refused = account.client.post(
            "/v1/subscriptions", {"customer": account.customer, "items[0][price]": price}
        )
    finally:
        account.client.control("rules", invoice_grace_s=HOUR_S)

    assert refused.status == 400
    assert "shorter than the service period" in refused.error["message"]


def test_usage_reported_in_grace_with_a_timestamp_in_the_period_is_included(account):
    """What comes late, but before the invoice is final, is billed where it belongs."""
    _, end = account.period()
    account.client.advance_to(end + HOUR_S - MINUTE_S)
    account.use("late", "5", timestamp=end - 1)
    account.client.advance(MINUTE_S)

    assert account.quantities() == [5]


def test_usage_with_a_timestamp_after_the_draft_was_made_goes_to_the_next_invoice(account):
    """The first second of a period is in it; the last second before is not."""
    _, end = account.period()
    account.client.advance_to(end + MINUTE_S)
    account.use("old", "1", timestamp=end - 1)
    account.use("new", "2", timestamp=end)
    account.client.advance_to(account.period()[1] + HOUR_S)

    assert account.quantities() == [1, 2]


def test_usage_reported_after_finalization_is_on_no_invoice(account):
    """Accepted, in the summaries, and billed nowhere: neither on the final invoice nor on the next."""
    _, end = account.period()
    account.use("in-time", "3")
    account.client.advance_to(end + HOUR_S)
    accepted = account.send("too-late", "4", timestamp=end - 1)
    summed = account.total()
    account.client.advance_to(account.period()[1] + HOUR_S)

    assert accepted.status == 200
    assert summed == 7.0
    assert account.quantities() == [3, 0]


def test_the_first_invoice_of_a_subscription_is_final_at_once(account):
    """It bills no usage, and no grace period holds it."""
    (first,) = account.client.get("/v1/invoices", customer=account.customer).body["data"]

    assert first["billing_reason"] == "subscription_create"
    assert (first["status"], first["total"]) == ("paid", 0)
    assert first["status_transitions"]["finalized_at"] == first["created"]


def test_a_price_that_changes_within_a_period_leaves_no_grace(account):
    """Each price has a line for its part; usage reported in grace is on neither, nor on the next invoice."""
    start, end = account.period()
    account.use("first-price", "10")
    account.client.advance(10 * DAY_S)
    changed_at = account.client.now()
    item = account.client.get(f"/v1/subscriptions/{account.subscription}").body["items"]["data"][0]["id"]
    account.client.made(
        f"/v1/subscriptions/{account.subscription}",
        {"items[0][id]": item, "items[0][price]": account.price(unit_amount="2.5")},
    )
    account.use("second-price", "20", timestamp=changed_at)
    account.client.advance_to(end)
    account.use("in-grace", "40", timestamp=end - 1)
    account.client.advance(HOUR_S)
    (invoice,) = account.invoices()
    lines = [(line["period"], line["quantity"], line["amount"]) for line in invoice["lines"]["data"]]
    account.client.advance_to(account.period()[1] + HOUR_S)

    assert lines == [
        ({"start": start, "end": changed_at}, 10, 10),
        ({"start": changed_at, "end": end}, 20, 50),
    ]
    assert account.quantities()[1:] == [0]


def test_a_negative_sum_is_invoiced_as_zero(account):
    """Stripe bills no less than nothing and carries nothing over."""
    _, end = account.period()
    account.use("plus", "2")
    account.use("minus", "-5")
    account.client.advance_to(end + HOUR_S)
    account.use("next", "1")
    account.client.advance_to(account.period()[1] + HOUR_S)

    assert account.quantities() == [0, 1]


def test_periods_of_the_31st_come_back_to_the_31st(sandbox):
    """Months are counted from the anchor, not from one boundary to the next."""
    account = Account(sandbox).subscribe(billing_cycle_anchor=_next_31st(sandbox))
    ends = []
    for _ in range(4):
        _, end = account.period()
        ends.append(end)
        sandbox.advance_to(end)

    days = [_day_of_month(end) for end in ends]
    assert days[0] == 31
    assert days[1] < 31
    assert 31 in days[2:]


def test_a_period_with_an_anchor_ahead_is_cut_at_the_anchor(sandbox):
    """The first period ends at the anchor; whole ones follow."""
    anchor = sandbox.now() + 3 * DAY_S
    account = Account(sandbox).subscribe(interval="week", billing_cycle_anchor=anchor)
    first = account.period()
    sandbox.advance_to(anchor)

    assert first == (anchor - 3 * DAY_S, anchor)
    assert account.period() == (anchor, anchor + 7 * DAY_S)


def test_a_far_jump_of_the_clock_makes_every_invoice_on_the_way(sandbox):
    """How time passes makes no difference."""
    account = Account(sandbox).subscribe(interval="day")
    start, _ = account.period()
    sandbox.advance(10 * DAY_S + 2 * HOUR_S)
    invoices = account.invoices()

    assert [invoice["period_end"] for invoice in invoices] == [start + n * DAY_S for n in range(1, 11)]
    assert {invoice["status"] for invoice in invoices} == {"paid"}


def test_an_invoice_can_be_finalized_by_hand_once(account):
    """Then it takes no usage any more, and a second time is refused."""
    _, end = account.period()
    account.use("in", "3")
    account.client.advance_to(end)
    (draft,) = account.invoices()
    final = account.client.made(f"/v1/invoices/{draft['id']}/finalize", {})
    account.use("late", "4", timestamp=end - 1)
    again = account.client.post(f"/v1/invoices/{draft['id']}/finalize")

    assert (final["status"], final["amount_due"]) == ("open", 3)
    assert again.status == 400
    assert account.quantities() == [3]


def test_invoices_are_found_by_customer_subscription_and_status(account):
    """And lines have a list of their own."""
    _, end = account.period()
    account.client.advance_to(end)
    get = account.client.get
    drafts = get("/v1/invoices", customer=account.customer, status="draft").body["data"]
    paid = get("/v1/invoices", subscription=account.subscription, status="paid").body["data"]
    lines = get(f"/v1/invoices/{drafts[0]['id']}/lines").body

    assert [invoice["billing_reason"] for invoice in drafts] == ["subscription_cycle"]
    assert [invoice["billing_reason"] for invoice in paid] == ["subscription_create"]
    assert lines["data"] == drafts[0]["lines"]["data"]
    assert get("/v1/invoices", customer=account.customer, **{"created[gte]": end}).body["data"] == drafts


def test_time_invoices_and_rules_survive_a_killed_sandbox(tmp_path):
    """SIGKILL with a draft in grace: the clock stands where it stood, and the draft becomes final."""
    with SandboxProcess.start(tmp_path, clock=START, grace_h=48) as first:
        account = Account(SandboxClient(first.url)).subscribe()
        _, end = account.period()
        account.use("in", "9")
        account.client.advance_to(end)
        first.stop(signal.SIGKILL)
    with SandboxProcess.start(tmp_path, clock="2030-01-01T00:00:00Z") as second:
        account.client = SandboxClient(second.url)
        at_restart = account.client.now()
        (draft,) = account.invoices()
        account.client.advance(48 * HOUR_S)
        (final,) = account.invoices()

    assert at_restart == end
    assert (draft["status"], draft["lines"]["data"][0]["quantity"]) == ("draft", 9)
    assert (final["status"], final["amount_due"]) == ("open", 9)


def _next_31st(client):
    """A moment on the 31st of a month within a month from now; the clock is moved to where there is one."""
    while True:
        now = client.now()
        for day in range(28):
            moment = now // DAY_S * DAY_S + day * DAY_S + 12 * HOUR_S
            if moment > now and _day_of_month(moment) == 31:
                return moment
        client.advance(20 * DAY_S)


def _day_of_month(moment):
    return datetime.fromtimestamp(moment, UTC).day
