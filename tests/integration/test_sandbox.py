"""The Stripe sandbox as billing meets it: stripe's own SDK over HTTP, against a sandbox process."""

from __future__ import annotations

import re
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
import stripe

from meterline.local.sandbox.process import SandboxProcess
from meterline.settings import SANDBOX_API_KEY

pytestmark = pytest.mark.stack

DAY_S = 86_400
MINUTE_S = 60


class Account:
    """One customer and one meter on a sandbox."""

    def __init__(self, url, key=SANDBOX_API_KEY):
        self.client = stripe.StripeClient(key, base_addresses={"api": url}, max_network_retries=0)
        self.event_name = f"credits_{uuid.uuid4().hex[:8]}"

    def open(self):
        self.customer = self.client.v1.customers.create({"name": "Acme", "metadata": {"client_id": "acme"}})
        self.meter = self.client.v1.billing.meters.create(
            {
                "display_name": "Credits",
                "event_name": self.event_name,
                "default_aggregation": {"formula": "sum"},
            }
        )
        return self

    def send(self, identifier, value="1", *, timestamp=None, key=None, customer=None):
        params = {
            "event_name": self.event_name,
            "payload": {"stripe_customer_id": customer or self.customer.id, "value": value},
            "identifier": identifier,
        }
        if timestamp is not None:
            params["timestamp"] = timestamp
        return self.client.v1.billing.meter_events.create(
            params, options={"idempotency_key": key} if key else {}
        )

    def summaries(self, *, start, end, **options):
        page = self.client.v1.billing.meters.event_summaries.list(
            self.meter.id, {"customer": self.customer.id, "start_time": start, "end_time": end, **options}
        )
        return [(item.start_time, item.aggregated_value) for item in page.data]

    def total(self):
        today = int(time.time()) // DAY_S * DAY_S
        found = self.summaries(start=today - 40 * DAY_S, end=today + 2 * DAY_S)
        return found[0][1] if found else 0.0


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with SandboxProcess.start(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


@pytest.fixture
def account(sandbox):
    return Account(sandbox.url).open()


def refused(call, kind=stripe.InvalidRequestError):
    with pytest.raises(kind) as error:
        call()
    return error.value


def test_customer_meter_and_event_have_stripes_shapes(account):
    """The SDK reads the three objects billing uses, and finds them again."""
    event = account.send("a", "17")

    assert account.client.v1.customers.retrieve(account.customer.id).metadata["client_id"] == "acme"
    assert account.client.v1.billing.meters.retrieve(account.meter.id).status == "active"
    assert (event.object, event.identifier, event.event_name) == (
        "billing.meter_event",
        "a",
        account.event_name,
    )
    assert event.payload.to_dict() == {"stripe_customer_id": account.customer.id, "value": "17"}
    assert account.total() == 17.0


def test_a_meters_event_name_is_unique_among_active_ones(account):
    """Two meters on one name would both be ambiguous; once deactivated the name is free."""
    params = {
        "display_name": "Again",
        "event_name": account.event_name,
        "default_aggregation": {"formula": "sum"},
    }
    error = refused(lambda: account.client.v1.billing.meters.create(params))
    account.client.v1.billing.meters.deactivate(account.meter.id)

    assert error.http_status == 400
    assert account.client.v1.billing.meters.create(params).event_name == account.event_name


def test_a_duplicate_identifier_is_refused_with_stripes_exact_text(account):
    """Billing takes this text for `it has arrived`: 400, no code, not to be retried, counted once."""
    account.send("x-1", "5")
    error = refused(lambda: account.send("x-1", "7"))

    assert error.http_status == 400
    assert error.user_message == "An event already exists with identifier x-1."
    assert error.code is None
    assert error.headers["Stripe-Should-Retry"] == "false"
    assert account.total() == 5.0


def test_an_idempotency_key_replays_the_first_answer(account):
    """The same request under the same key is the same answer, and counts once."""
    first = account.send("k-1", "5", key=f"key {account.event_name}")
    second = account.send("k-1", "5", key=f"key {account.event_name}")

    assert second.last_response.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.last_response.headers
    assert first == second
    assert account.total() == 5.0


def test_an_idempotency_key_replays_a_refusal_too(account):
    """A duplicate that was refused stays refused under its key."""
    account.send("k-2")
    first = refused(lambda: account.send("k-2", key=f"refused {account.event_name}"))
    second = refused(lambda: account.send("k-2", key=f"refused {account.event_name}"))

    assert first.user_message == second.user_message
    assert second.headers["Idempotent-Replayed"] == "true"


def test_an_idempotency_key_with_other_parameters_is_an_error(account):
    """A key names one request; nothing of the other one is done."""
    account.send("k-3", "5", key=f"other {account.event_name}")
    error = refused(
        lambda: account.send("k-4", "6", key=f"other {account.event_name}"), stripe.IdempotencyError
    )

    assert error.http_status == 400
    assert account.total() == 5.0


def test_timestamps_reach_35_days_back_and_5_minutes_ahead(account):
    """Inside of both edges it counts; outside Stripe refuses, naming the earliest it takes."""
    now = int(time.time())
    account.send("old", timestamp=now - 35 * DAY_S + MINUTE_S)
    account.send("ahead", timestamp=now + 4 * MINUTE_S)
    too_old = refused(lambda: account.send("too-old", timestamp=now - 35 * DAY_S - MINUTE_S))
    too_far = refused(lambda: account.send("too-far", timestamp=now + 6 * MINUTE_S))

    assert (too_old.http_status, too_old.param) == (400, "timestamp")
    assert re.match(
        r"The event timestamp cannot be more than 35 days in past\. "
        r"Expected a timestamp greater than or equal to \d+\.$",
        too_old.user_message,
    )
    assert (too_far.http_status, too_far.param) == (400, "timestamp")
    assert account.total() == 2.0


def test_a_value_has_at_most_15_digits(account):
    """Stripe refuses the 16th instead of rounding money."""
    account.send("fifteen", "123456789012345")
    error = refused(lambda: account.send("sixteen", "1234567890123456"))

    assert error.http_status == 400
    assert account.total() == 123456789012345.0


def test_negative_values_take_back(account):
    """Corrections are usage records below zero."""
    account.send("plus", "10")
    account.send("minus", "-4")

    assert account.total() == 6.0


@pytest.mark.parametrize("key", ["sk_test_somebody_elses", "sk_live_real"])
def test_any_other_key_is_401(sandbox, key):
    """A wrong configuration is refused, and a live key never leaves this machine unnoticed."""
    stranger = Account(sandbox.url, key)

    assert refused(stranger.open, stripe.AuthenticationError).http_status == 401


def test_concurrent_calls_on_one_customer_and_meter_are_429(account):
    """Stripe's concurrency limit: whoever was refused was not counted, and may send again."""

    def send(number):
        try:
            account.send(f"race-{number}")
        except stripe.RateLimitError as error:
            return error.http_status, error.json_body["error"]["code"]  # the SDK leaves `code` empty
        return 200, None

    sent = []
    deadline = time.monotonic() + 30
    with ThreadPoolExecutor(16) as pool:
        # Two calls must meet inside a disk write: rounds of 64 until some did.
        while (429, "lock_timeout") not in sent and time.monotonic() < deadline:
            sent += pool.map(send, range(len(sent), len(sent) + 64))

    assert set(sent) == {(200, None), (429, "lock_timeout")}
    assert account.total() == float(sent.count((200, None)))


def test_summaries_by_hour_and_day(account):
    """Buckets start at whole hours and days; the end of a range is outside of it."""
    yesterday = int(time.time()) // DAY_S * DAY_S - DAY_S
    account.send("h-1", "1", timestamp=yesterday)
    account.send("h-2", "2", timestamp=yesterday + 3_599)
    account.send("h-3", "4", timestamp=yesterday + 3_600)

    assert account.summaries(start=yesterday, end=yesterday + DAY_S, value_grouping_window="hour") == [
        (yesterday + 3_600, 4.0),
        (yesterday, 3.0),
    ]
    assert account.summaries(start=yesterday, end=yesterday + DAY_S, value_grouping_window="day") == [
        (yesterday, 7.0)
    ]
    assert account.summaries(start=yesterday, end=yesterday + 3_600) == [(yesterday, 3.0)]


def test_what_was_answered_survives_a_killed_sandbox(tmp_path):
    """SIGKILL: objects, sums, identifiers and idempotency keys are all known after the restart."""
    with SandboxProcess.start(tmp_path) as first:
        account = Account(first.url).open()
        for number in range(20):
            account.send(f"e-{number}", str(number))
        account.send("keyed", "100", key="k")
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        with SandboxProcess.start(tmp_path) as second:
            again = Account(second.url)
            again.event_name, again.customer, again.meter = (
                account.event_name,
                account.customer,
                account.meter,
            )
            duplicate = refused(lambda: again.send("e-7", "7"))
            replayed = again.send("keyed", "100", key="k")
            total = again.total()

    assert total == sum(range(20)) + float(Decimal(100))
    assert duplicate.user_message == "An event already exists with identifier e-7."
    assert replayed.last_response.headers["Idempotent-Replayed"] == "true"
