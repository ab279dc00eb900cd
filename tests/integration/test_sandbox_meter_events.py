"""Stripe's documented rules of meter events, summaries, corrections and reports, one test each.

Plain HTTP against a sandbox process whose clock stands: nothing of ours that sends, no library of Stripe's.
"""

from __future__ import annotations

import pytest
from tests.sandbox_account import DAY_S, HOUR_S, MINUTE_S, Account, SandboxClient

from meterline.local.sandbox.process import SandboxProcess

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with SandboxProcess.start(tmp_path_factory.mktemp("sandbox"), clock="2026-03-01T10:00:00Z") as running:
        yield SandboxClient(running.url)


@pytest.fixture(autouse=True)
def default_rules(sandbox):
    yield
    sandbox.control(
        "rules",
        summary_lag_s=0,
        async_codes=["meter_event_customer_not_found"],
        report_delay_s=0,
        report_samples_max=5,
    )


@pytest.fixture
def account(sandbox):
    return Account(sandbox)


def raw(account, **changed):
    """A request with other parameters than the usual; None leaves one out."""
    params = account.params("raw") | changed
    return account.client.post(
        "/v1/billing/meter_events", {name: value for name, value in params.items() if value is not None}
    )


# Parameters


@pytest.mark.parametrize("absent", ["event_name", "payload[stripe_customer_id]", "payload[value]"])
def test_event_name_and_payload_with_customer_and_value_are_required(account, absent):
    assert raw(account, **{absent: None}).status == 400
    assert account.total() is None


@pytest.mark.parametrize("name", ["event_name", "identifier"])
def test_names_have_at_most_100_characters(account, name):
    assert raw(account, identifier=account.event_name.ljust(100, "i")).status == 200
    assert raw(account, **{name: "n" * 101}).status == 400


def test_the_payload_is_a_flat_map_of_strings(account):
    assert raw(account, **{"payload[value]": None, "payload[value][deep]": "1"}).status == 400


def test_an_event_without_identifier_gets_one_and_without_timestamp_the_time_of_receipt(account):
    first, second = raw(account, identifier=None).body, raw(account, identifier=None).body

    assert first["identifier"] != second["identifier"]
    assert first["timestamp"] == first["created"] == account.client.now()


def test_a_meter_needs_no_subscription_to_accept_events(account):
    account.use("a", "3")

    assert account.total() == 3.0


def test_one_event_name_has_one_active_meter(account):
    again = {
        "display_name": "Again",
        "event_name": account.event_name,
        "default_aggregation[formula]": "sum",
    }

    assert account.client.post("/v1/billing/meters", again).status == 400
    account.client.made(f"/v1/billing/meters/{account.meter}/deactivate", {})
    assert account.client.post("/v1/billing/meters", again).status == 200


def test_of_a_meter_only_the_display_name_changes(account):
    path = f"/v1/billing/meters/{account.meter}"

    assert account.client.made(path, {"display_name": "Other"})["display_name"] == "Other"
    assert account.client.post(path, {"display_name": "Other", "event_name": "other"}).status == 400
    assert account.client.get(path).body["event_name"] == account.event_name


def test_an_unknown_or_deactivated_meter_accepts_no_events(account):
    account.client.made(f"/v1/billing/meters/{account.meter}/deactivate", {})

    assert account.send("inactive").status == 400
    assert raw(account, event_name="nobody_s").status == 400


# Identifiers


def test_a_duplicate_identifier_is_400_without_code_and_not_to_be_retried(account):
    account.use("x", "5")
    refused = account.send("x", "7")

    assert refused.status == 400
    assert refused.error == {
        "type": "invalid_request_error",
        "message": f"An event already exists with identifier {account.event_name} x.",
    }
    assert refused.headers["stripe-should-retry"] == "false"
    assert account.total() == 5.0


def test_a_duplicate_under_the_same_key_replays_the_200_and_counts_once(account):
    first = account.send("x", "5", key=f"{account.event_name} key")
    second = account.send("x", "5", key=f"{account.event_name} key")

    assert (first.status, second.status) == (200, 200)
    assert second.headers["idempotent-replayed"] == "true"
    assert account.total() == 5.0


def test_an_identifier_is_unique_for_24_hours_and_counts_again_after(account):
    account.use("x", "5")
    account.client.advance(DAY_S)
    within = account.send("x", "5")
    account.client.advance(1)
    after = account.send("x", "5")

    assert (within.status, after.status) == (400, 200)
    assert account.total() == 10.0


# Timestamps and values


def test_timestamps_reach_35_days_back_and_5_minutes_ahead(account):
    now = account.client.now()
    account.use("oldest", timestamp=now - 35 * DAY_S)
    account.use("newest", timestamp=now + 5 * MINUTE_S)
    too_old = account.send("too-old", timestamp=now - 35 * DAY_S - 1)
    too_new = account.send("too-new", timestamp=now + 5 * MINUTE_S + 1)

    assert (too_old.status, too_new.status) == (400, 400)
    assert too_old.error["message"] == (
        "The event timestamp cannot be more than 35 days in past. "
        f"Expected a timestamp greater than or equal to {now - 35 * DAY_S}."
    )
    assert account.total() == 2.0


def test_values_may_be_decimal_and_negative(account):
    account.use("plus", "10.25")
    account.use("minus", "-0.5")

    assert account.total() == 9.75


def test_a_value_of_more_than_15_significant_digits_is_refused(account):
    account.use("fifteen", "123456789012345")

    assert account.send("sixteen", "1234567890123456").status == 400
    assert account.total() == 123456789012345.0


# Aggregation


@pytest.mark.parametrize(("formula", "expected"), [("sum", 6), ("count", 3), ("last", 2)])
def test_meters_sum_count_or_take_the_last(sandbox, formula, expected):
    """On the invoice and in the summaries, which are computed apart."""
    account = Account(sandbox, formula=formula).subscribe(interval="day")
    now = account.client.now()
    account.client.advance(HOUR_S)
    account.use("a", "3", timestamp=now + MINUTE_S)
    account.use("b", "1", timestamp=now)
    account.use("c", "2", timestamp=now + MINUTE_S)
    summed = account.total()
    account.client.advance_to(account.period()[1] + HOUR_S)

    assert summed == expected
    assert account.quantities() == [expected]


def test_max_is_no_formula(sandbox):
    refused = sandbox.post(
        "/v1/billing/meters",
        {"display_name": "M", "event_name": "max_meter", "default_aggregation[formula]": "max"},
    )

    assert refused.status == 400


@pytest.mark.parametrize(("window", "expected"), [("hour", 6), ("day", 2)])
def test_of_a_pre_aggregated_meter_the_last_received_event_of_each_window_counts(sandbox, window, expected):
    """By UTC hour or day of the timestamp, in summaries and on the invoice; resending a total overwrites."""
    sandbox.advance_to(sandbox.now() // DAY_S * DAY_S + DAY_S + 5 * HOUR_S)
    account = Account(sandbox, window=window).subscribe(interval="day")
    start = account.client.now()
    account.client.advance(3 * HOUR_S)
    account.use("a", "1", timestamp=start + 2 * MINUTE_S)
    account.use("b", "4", timestamp=start + MINUTE_S)
    account.use("c", "2", timestamp=start + HOUR_S)
    summed = account.total()
    account.client.advance_to(account.period()[1] + HOUR_S)

    assert summed == expected
    assert account.quantities() == [expected]


# Summaries


def test_summaries_show_an_event_after_their_lag(account):
    """Eventually consistent: an absent event proves nothing until the lag is over."""
    account.client.control("rules", summary_lag_s=600)
    account.use("x", "5")
    account.client.advance(599)
    before = account.total()
    account.client.advance(1)

    assert before is None
    assert account.total() == 5.0


def test_an_invoice_does_not_lag_behind(sandbox):
    """A line is counted from the events themselves."""
    account = Account(sandbox).subscribe(interval="day")
    _, end = account.period()
    account.client.control("rules", summary_lag_s=3 * HOUR_S)
    account.client.advance_to(end - 1)
    account.use("x", "5")
    account.client.advance(1 + HOUR_S)

    assert account.total() is None
    assert account.quantities() == [5]


@pytest.mark.parametrize(
    ("grouping", "start", "end"),
    [(None, 30, 3_600), ("hour", 60, 3_600), ("hour", 0, 3_660), ("day", 3_600, 86_400)],
)
def test_summaries_are_aligned_to_minute_hour_or_day(account, grouping, start, end):
    midnight = account.client.now() // DAY_S * DAY_S
    query = {"customer": account.customer, "start_time": midnight + start, "end_time": midnight + end}
    query |= {} if grouping is None else {"value_grouping_window": grouping}

    assert account.client.get(f"/v1/billing/meters/{account.meter}/event_summaries", **query).status == 400


def test_summaries_come_ten_a_page_by_default_and_at_most_100(account):
    midnight = account.client.now() // DAY_S * DAY_S
    for hour in range(12):
        account.use(f"{hour}", "1", timestamp=midnight - (hour + 1) * HOUR_S)
    path = f"/v1/billing/meters/{account.meter}/event_summaries"
    query = {
        "customer": account.customer,
        "start_time": midnight - DAY_S,
        "end_time": midnight,
        "value_grouping_window": "hour",
    }
    first = account.client.get(path, **query).body
    rest = account.client.get(path, **query, starting_after=first["data"][-1]["id"]).body

    assert (len(first["data"]), first["has_more"]) == (10, True)
    assert (len(rest["data"]), rest["has_more"]) == (2, False)
    assert account.client.get(path, **query, limit=101).status == 400


# Corrections


def cancel(account, identifier, **changed):
    params = {
        "event_name": account.event_name,
        "type": "cancel",
        "cancel[identifier]": f"{account.event_name} {identifier}",
    }
    return account.client.post("/v1/billing/meter_event_adjustments", params | changed)


def test_a_cancelled_event_leaves_summaries_and_draft(sandbox):
    account = Account(sandbox).subscribe(interval="day")
    _, end = account.period()
    account.client.advance_to(end - MINUTE_S)
    account.use("wrong", "100")
    account.use("right", "1")
    account.client.advance_to(end)
    before = account.quantities()
    cancelled = cancel(account, "wrong")

    assert before == [101]
    assert (cancelled.status, cancelled.body["status"]) == (200, "complete")
    assert account.quantities() == [1]
    assert account.total() == 1.0


def test_a_cancellation_never_changes_a_final_invoice(sandbox):
    account = Account(sandbox).subscribe(interval="day")
    _, end = account.period()
    account.client.advance_to(end - MINUTE_S)
    account.use("wrong", "100")
    account.client.advance_to(end + HOUR_S)

    assert cancel(account, "wrong").status == 200
    assert account.quantities() == [100]


def test_an_event_can_be_cancelled_within_24_hours_of_its_receipt(account):
    """Of receipt, whatever its timestamp."""
    account.use("first", "5", timestamp=account.client.now() - 30 * DAY_S)
    account.use("second", "7")
    account.client.advance(DAY_S)
    within = cancel(account, "first")
    account.client.advance(1)

    assert within.status == 200
    assert cancel(account, "second").status == 400
    assert account.total() == 7.0


def test_a_cancellation_is_pending_while_summaries_lag(account):
    account.use("x", "5")
    account.client.control("rules", summary_lag_s=60)
    account.client.advance(60)
    cancelled = cancel(account, "x")
    shown = account.total()
    account.client.advance(60)

    assert cancelled.body["status"] == "pending"
    assert shown == 5.0
    assert account.total() is None


def test_only_known_single_events_can_be_cancelled(account):
    """Unknown ones, another meter's and ranges of time are refused."""
    account.use("x", "5")

    assert cancel(account, "nobody-s").status == 400
    assert cancel(account, "x", event_name="other").status == 400
    assert cancel(account, "x", type="time_range").status == 400
    assert account.total() == 5.0


def test_the_identifier_of_a_cancelled_event_stays_used(account):
    """Documented nowhere; the harder reading."""
    account.use("x", "5")
    cancel(account, "x")

    assert account.send("x", "6").status == 400


# Rejections after a 200


def reports(account, **query):
    return account.client.get("/v2/core/events", object_id=account.meter, **query).body["data"]


def test_an_unknown_customer_is_answered_with_200_and_reported_later(account):
    """The report names the request's idempotency key, the meter, and the ten seconds it covers."""
    start = account.client.advance(10) // 10 * 10
    account.client.advance_to(start + 10)
    accepted = account.send("x", "5", customer="cus_nobody", key=f"{account.event_name} key")
    early = reports(account)
    account.client.advance(10)
    (event,) = reports(account)
    (error,) = event["data"]["reason"]["error_types"]

    assert accepted.status == 200
    assert early == []
    assert event["type"] == "v1.billing.meter.error_report_triggered"
    assert event["related_object"] == {
        "id": account.meter,
        "type": "billing.meter",
        "url": f"/v1/billing/meters/{account.meter}",
    }
    assert (error["code"], error["error_count"]) == ("meter_event_customer_not_found", 1)
    assert error["sample_errors"][0]["request"]["identifier"] == f"{account.event_name} key"
    assert event["data"]["reason"]["error_count"] == 1
    assert event["data"]["validation_start"] < event["data"]["validation_end"] <= event["created"]
    assert account.total() is None


def test_the_identifier_of_a_rejected_event_is_held(account):
    account.send("x", "5", customer="cus_nobody")

    assert account.send("x", "5").status == 400


def test_a_report_lists_samples_only(account):
    """All are counted, some are named."""
    account.client.control("rules", report_samples_max=2)
    for number in range(5):
        account.send(f"{number}", customer="cus_nobody", key=f"{account.event_name} {number}")
    account.client.advance(20)
    (event,) = reports(account)
    (error,) = event["data"]["reason"]["error_types"]

    assert (error["error_count"], len(error["sample_errors"])) == (5, 2)


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("archived_meter", {}),
        ("meter_event_invalid_value", {"payload[value]": "many"}),
        ("meter_event_no_customer_defined", {"payload[stripe_customer_id]": None}),
        ("meter_event_value_not_found", {"payload[value]": None, "payload[other]": "1"}),
        ("meter_event_value_too_many_digits", {"payload[value]": "1234567890123456"}),
        ("timestamp_in_future", {"timestamp": 301}),
        ("timestamp_too_far_in_past", {"timestamp": -35 * DAY_S - 1}),
    ],
)
def test_any_fault_may_be_found_at_once_or_afterwards(account, code, changed):
    """Stripe's pages disagree on which are which: the rules choose."""
    if "timestamp" in changed:
        changed = {"timestamp": account.client.now() + changed["timestamp"]}
    if code == "archived_meter":
        account.client.made(f"/v1/billing/meters/{account.meter}/deactivate", {})
    at_once = raw(account, **changed)
    account.client.control("rules", async_codes=[code])
    later = raw(account, **changed)
    account.client.advance(20)
    (event,) = reports(account)

    assert (at_once.status, later.status) == (400, 200)
    assert event["data"]["reason"]["error_types"][0]["code"] == code
    assert account.total() is None


def test_an_event_without_any_meter_has_a_report_of_its_own_kind(account):
    account.client.control("rules", async_codes=["no_meter"])
    accepted = raw(account, event_name="nobody_s", identifier=None)
    account.client.advance(20)
    found = account.client.get("/v2/core/events", **{"types[0]": "v1.billing.meter.no_meter_found"}).body[
        "data"
    ]

    assert accepted.status == 200
    assert "related_object" not in found[0]
    assert found[0]["data"]["reason"]["error_types"][0]["code"] == "no_meter"


def test_reports_can_come_hours_later(account):
    account.client.control("rules", report_delay_s=2 * HOUR_S)
    account.send("x", customer="cus_nobody")
    account.client.advance(2 * HOUR_S - 10)
    early = reports(account)
    account.client.advance(20)

    assert early == []
    assert len(reports(account)) == 1


def test_events_are_read_by_object_type_and_time_for_30_days(account):
    """And each by its id, with its data; pages follow their URL."""
    for _ in range(3):
        account.send(f"{account.client.now()}", customer="cus_nobody")
        account.client.advance(20)
    newest, middle, oldest = reports(account)
    page = account.client.get("/v2/core/events", object_id=account.meter, limit=2).body
    rest = account.client.get(page["next_page_url"]).body
    by_id = account.client.get(f"/v2/core/events/{oldest['id']}")
    between = reports(account, **{"created[gt]": oldest["created"], "created[lte]": middle["created"]})
    other = reports(account, **{"types[0]": "v1.billing.meter.no_meter_found"})
    account.client.advance(30 * DAY_S + 60)

    assert (page["data"], rest["data"]) == ([newest, middle], [oldest])
    assert rest["next_page_url"] is None
    assert by_id.body == oldest
    assert between == [middle]
    assert other == []
    assert reports(account) == []
    assert account.client.get(f"/v2/core/events/{oldest['id']}").status == 404
