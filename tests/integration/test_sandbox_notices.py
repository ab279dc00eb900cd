"""What the sandbox tells by itself, and API v2: signed webhooks, their retries, and keys of 30 days."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.sandbox_account import DAY_S, HOUR_S, MINUTE_S, Account, SandboxClient

from meterline.local.sandbox.moments import rfc3339
from meterline.local.sandbox.process import SandboxProcess

pytestmark = pytest.mark.stack

ERROR_REPORT = "v1.billing.meter.error_report_triggered"
WAIT_S = 30.0
"""A delivery takes a tenth of a second; a busy machine longer."""


class Receiver:
    """A webhook endpoint: what it got, and the status it answers."""

    def __init__(self):
        self.got = []
        self.status = 200
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((body, self.headers["Stripe-Signature"]))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def wait_for(self, count):
        deadline = time.monotonic() + WAIT_S
        while len(self.got) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.got) == count
        return [json.loads(body) for body, _ in self.got]


@pytest.fixture
def receiver():
    endpoint = Receiver()
    thread = threading.Thread(target=endpoint.server.serve_forever)
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    thread.join()
    endpoint.server.server_close()


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """Shared: earlier tests' receivers are gone, and deliveries to them fail, which nobody minds."""
    with SandboxProcess.start(tmp_path_factory.mktemp("sandbox"), clock="2026-03-01T10:00:00Z") as running:
        yield SandboxClient(running.url)


def listen(sandbox, receiver, event_payload, *types):
    answer = sandbox.post_json(
        "/v2/core/event_destinations",
        {
            "name": "test",
            "type": "webhook_endpoint",
            "event_payload": event_payload,
            "enabled_events": list(types),
            "webhook_endpoint": {"url": receiver.url},
            "include": ["webhook_endpoint.signing_secret"],
        },
    )
    assert answer.status == 200, answer.body
    return answer.body["webhook_endpoint"]["signing_secret"]


def test_a_thin_event_is_delivered_signed_and_without_its_data(sandbox, receiver):
    """HMAC-SHA256 of "time.body" under the secret that only the creation tells; the data is fetched."""
    secret = listen(sandbox, receiver, "thin", ERROR_REPORT)
    Account(sandbox).send("x", customer="cus_nobody")
    sandbox.advance(20)
    (event,) = receiver.wait_for(1)
    body, header = receiver.got[0]
    moment, signed = (part.split("=")[1] for part in header.split(","))
    listed = sandbox.get("/v2/core/event_destinations").body["data"][0]

    assert event["type"] == ERROR_REPORT
    assert "data" not in event
    assert hmac.new(secret.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest() == signed
    assert abs(int(moment) - sandbox.now()) <= 1
    assert sandbox.get(f"/v2/core/events/{event['id']}").body["data"]["reason"]["error_count"] == 1
    assert listed["webhook_endpoint"] == {"signing_secret": None, "url": receiver.url}


def test_a_delivery_that_fails_is_made_again_three_times(sandbox, receiver):
    """After a minute, an hour and six of the sandbox's time; then no more."""
    listen(sandbox, receiver, "thin", ERROR_REPORT)
    receiver.status = 500
    Account(sandbox).send("x", customer="cus_nobody")
    sandbox.advance(20)
    receiver.wait_for(1)
    for number, wait_s in enumerate((MINUTE_S, HOUR_S, 6 * HOUR_S), 2):
        sandbox.advance(wait_s)
        receiver.wait_for(number)
    receiver.status = 200
    sandbox.advance(3 * DAY_S)
    Account(sandbox).send("y", customer="cus_nobody")
    sandbox.advance(20)
    bodies = receiver.wait_for(5)  # what is due goes in order: a fifth delivery of the first would be here

    assert [body["id"] == bodies[0]["id"] for body in bodies] == [True] * 4 + [False]


def test_a_draft_waits_for_who_is_told_of_it(sandbox, receiver):
    """Final an hour after `invoice.created` was answered; its delivery fails until then."""
    listen(sandbox, receiver, "snapshot", "invoice.created", "invoice.finalized")
    receiver.status = 500
    account = Account(sandbox).subscribe()
    _, end = account.period()
    sandbox.advance_to(end)
    receiver.wait_for(1)
    receiver.status = 200
    sandbox.advance(2 * HOUR_S)
    created = receiver.wait_for(2)[-1]
    waiting = account.invoices()
    sandbox.advance(HOUR_S)
    finalized = receiver.wait_for(3)[-1]

    assert (created["type"], created["data"]["object"]["id"]) == ("invoice.created", waiting[0]["id"])
    assert waiting[0]["status"] == "draft"
    assert finalized["type"] == "invoice.finalized"
    assert account.invoices()[0]["status_transitions"]["finalized_at"] >= end + 3 * HOUR_S


def test_a_draft_waits_at_most_72_hours(sandbox, receiver):
    """Whoever never answers doesn't stop the invoice for ever."""
    listen(sandbox, receiver, "snapshot", "invoice.created")
    receiver.status = 500
    account = Account(sandbox).subscribe()
    _, end = account.period()
    sandbox.advance_to(end + 72 * HOUR_S - 1)
    before = account.invoices()[0]["status"]
    sandbox.advance(1)

    assert (before, account.invoices()[0]["status"]) == ("draft", "paid")


# API v2


def send_v2(account, identifier, value="1", *, key=None, **changed):
    body = {
        "event_name": account.event_name,
        "identifier": f"{account.event_name} {identifier}",
        "payload": {"stripe_customer_id": account.customer, "value": value},
    }
    return account.client.post_json("/v2/billing/meter_events", body | changed, key=key)


def test_v2_refuses_with_codes(sandbox):
    """A duplicate has one; negative, fractional and absent values and unknown meters too."""
    account = Account(sandbox)
    a_minute_ago = rfc3339(sandbox.now() - MINUTE_S)
    accepted = send_v2(account, "x", "5", timestamp=a_minute_ago)
    no_customer = {"payload": {"value": "1"}}
    codes = [
        send_v2(account, "x", "5").error["code"],
        send_v2(account, "y", "-5").error["code"],
        send_v2(account, "y", "1.5").error["code"],
        send_v2(account, "y", payload={"stripe_customer_id": account.customer}).error["code"],
        send_v2(account, "y", **no_customer).error["code"],
        send_v2(account, "y", event_name="nobody_s").error["code"],
    ]

    assert (accepted.status, accepted.body["timestamp"]) == (200, a_minute_ago)
    assert accepted.body["object"] == "v2.billing.meter_event"
    assert codes == [
        "duplicate_meter_event",
        "payload_invalid_value",
        "payload_invalid_value",
        "payload_no_value_defined",
        "payload_no_customer_defined",
        "no_meter",
    ]
    assert account.total() == 5.0


def test_a_v2_key_is_known_for_30_days(sandbox):
    """Longer than the identifier: the same key changes nothing even when the identifier is free again."""
    account = Account(sandbox)
    send_v2(account, "x", "5", key="v2 key")
    sandbox.advance(30 * DAY_S)
    within = send_v2(account, "x", "5", key="v2 key")
    sandbox.advance(1)
    after = send_v2(account, "x", "5", key="v2 key")

    assert (within.status, after.status) == (200, 200)
    assert account.total() == 10.0


def test_a_v2_request_that_failed_is_executed_again_under_its_key(sandbox):
    """Unlike v1, which replays the failure."""
    account = Account(sandbox)
    sandbox.control("faults", action="error_500_before_commit", path="^/v2/", count=1)
    first = send_v2(account, "x", "5", key="v2 failed")
    second = send_v2(account, "x", "5", key="v2 failed")

    assert (first.status, second.status) == (500, 200)
    assert account.total() == 5.0
