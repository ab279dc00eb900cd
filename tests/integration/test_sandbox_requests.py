"""Stripe's documented rules of requests: idempotency keys, limits, concurrency; and the sandbox's faults.

Plain HTTP against a sandbox process whose clock stands: nothing of ours that sends, no library of Stripe's.
"""

from __future__ import annotations

import http.client
import threading
import time

import pytest
from tests.sandbox_account import DAY_S, HOUR_S, Account, SandboxClient

from meterline.local.sandbox.process import SandboxProcess

pytestmark = pytest.mark.stack

BROKEN = (http.client.HTTPException, OSError)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with SandboxProcess.start(tmp_path_factory.mktemp("sandbox"), clock="2026-03-01T10:00:00Z") as process:
        yield process


@pytest.fixture(scope="module")
def sandbox(running):
    return SandboxClient(running.url)


@pytest.fixture
def account(sandbox):
    yield Account(sandbox)
    sandbox.request("DELETE", "/_sandbox/faults")
    sandbox.control(
        "rules",
        rate_limit_per_s=0,
        meter_event_rate_limit_per_s=0,
        rate_limit_reason=True,
        concurrency_status=429,
    )


@pytest.fixture
def key(account):
    return f"{account.event_name} key"


def fault(account, action, **more):
    return account.client.control("faults", action=action, **more)


def applied(account):
    return [one["applied"] for one in account.client.get("/_sandbox/faults").body["data"]]


# Idempotency keys of API v1


def test_a_key_has_at_most_255_characters(account):
    assert account.send("x", key="k" * 255).status == 200
    assert account.send("y", key="k" * 256).status == 400


def test_the_first_result_is_replayed_whatever_it_was(account, key):
    """A refusal from the rules too: the same body, marked as a replay."""
    account.use("x")
    first = account.send("x", key=key)
    second = account.send("x", key=key)

    assert (first.status, second.status) == (400, 400)
    assert second.body == first.body
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"


def test_a_500_is_replayed_also_where_it_had_an_effect(account, key):
    """Only a new key with the same identifier tells: `already exists` means the first one landed."""
    fault(account, "error_500_after_commit", count=1)
    first = account.send("x", "5", key=key)
    replayed = account.send("x", "5", key=key)
    with_new_key = account.send("x", "5", key=f"{key} 2")

    assert (first.status, replayed.status, with_new_key.status) == (500, 500, 400)
    assert first.error["type"] == "api_error"
    assert "already exists" in with_new_key.error["message"]
    assert account.total() == 5.0


def test_a_500_without_effect_is_replayed_too(account, key):
    """And a new key with the same identifier is accepted, because nothing had landed."""
    fault(account, "error_500_before_commit", count=1)
    first = account.send("x", "5", key=key)
    replayed = account.send("x", "5", key=key)

    assert (first.status, replayed.status) == (500, 500)
    assert account.total() is None
    assert account.send("x", "5", key=f"{key} 2").status == 200


def test_a_key_is_forgotten_after_24_hours_and_executes_again(account, key):
    account.send("x", "5", key=key)
    account.client.advance(DAY_S)
    within = account.send("x", "5", key=key)
    account.client.advance(1)
    after = account.send("x", "5", key=key)

    assert within.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in after.headers
    assert (after.status, account.total()) == (200, 10.0)


def test_a_key_with_other_parameters_is_an_error(account, key):
    account.send("x", "5", key=key)
    other = account.send("y", "6", key=key)

    assert (other.status, other.error["type"]) == (400, "idempotency_error")
    assert account.total() == 5.0


def meanwhile(running, account, key, second):
    """What `second` answers while a request of the account, under a key, is slow."""
    fault(account, "slow", count=1, delay_s=1)
    other = SandboxClient(running.url)
    slow = threading.Thread(
        target=lambda: other.post("/v1/billing/meter_events", account.params("x"), key=key)
    )
    slow.start()
    while applied(account) != [1]:
        time.sleep(0.01)
    answer = second()
    slow.join()
    return answer


def test_a_key_in_use_is_409_and_saves_nothing(running, account, key):
    refused = meanwhile(running, account, key, lambda: account.send("x", key=key))
    afterwards = account.send("x", key=key)

    assert (refused.status, refused.error["code"]) == (409, "idempotency_key_in_use")
    assert (afterwards.status, afterwards.headers["idempotent-replayed"]) == (200, "true")


@pytest.mark.parametrize("refusal", ["rate_limit_429", "invalid", "unauthorized"])
def test_what_is_refused_before_the_idempotency_layer_is_not_stored(account, key, refusal):
    """429, most validation errors and a wrong API key leave the key unused."""
    if refusal == "rate_limit_429":
        fault(account, refusal, count=1)
        assert account.send("x", "5", key=key).status == 429
    elif refusal == "invalid":
        broken = account.params("x") | {"timestamp": "soon"}
        assert account.client.post("/v1/billing/meter_events", broken, key=key).status == 400
    else:
        wrong = {"Authorization": "Bearer sk_test_wrong"}
        assert (
            account.client.request("POST", "/v1/billing/meter_events", key=key, headers=wrong).status == 401
        )

    accepted = account.send("x", "5", key=key)
    assert accepted.status == 200
    assert "idempotent-replayed" not in accepted.headers


# Limits


def test_the_account_has_a_limit_a_second_with_the_reason_in_a_header(account):
    """A test account's 25; the next second begins anew."""
    account.client.control("rules", rate_limit_per_s=25)
    account.client.advance(1)
    statuses = [account.client.get("/v1/customers").status for _ in range(26)]
    refused = account.client.get("/v1/customers")
    account.client.advance(1)

    assert statuses == [200] * 25 + [429]
    assert refused.headers["stripe-rate-limited-reason"] == "global-rate"
    assert account.client.get("/v1/customers").status == 200


def test_meter_events_have_a_limit_of_their_own(account):
    account.client.control("rules", meter_event_rate_limit_per_s=3)
    account.client.advance(1)
    sent = [account.send(f"{number}") for number in range(4)]

    assert [answer.status for answer in sent] == [200, 200, 200, 429]
    assert sent[-1].headers["stripe-rate-limited-reason"] == "endpoint-rate"
    assert account.client.get("/v1/customers").status == 200
    assert account.total() == 3.0


def test_a_429_may_come_without_the_header(account):
    account.client.control("rules", rate_limit_per_s=1, rate_limit_reason=False)
    account.client.advance(1)
    statuses = [account.client.get("/v1/customers") for _ in range(2)]

    assert statuses[-1].status == 429
    assert "stripe-rate-limited-reason" not in statuses[-1].headers


@pytest.mark.parametrize("status", [409, 429])
def test_one_call_at_a_time_for_a_customer_and_meter(running, account, key, status):
    """409 or 429, both were seen; nothing of the refused call is recorded."""
    account.client.control("rules", concurrency_status=status)
    refused = meanwhile(running, account, key, lambda: account.send("y", key=f"{key} 2"))

    assert refused.status == status
    assert account.send("y", key=f"{key} 2").status == 200
    assert account.total() == 2.0


def test_other_customers_of_the_meter_do_not_wait(running, account, key):
    other = account.client.made("/v1/customers", {"name": "Other"})["id"]
    accepted = meanwhile(running, account, key, lambda: account.send("y", customer=other))

    assert accepted.status == 200


# Faults


def test_dropped_before_commit_nothing_has_happened(account, key):
    fault(account, "drop_before_commit", count=1)
    with pytest.raises(BROKEN):
        account.send("x", "5", key=key)

    assert account.total() is None
    assert account.send("x", "5", key=key).status == 200


def test_dropped_after_commit_it_has_happened(account, key):
    """The same key replays the answer that was lost; a new key finds the identifier taken."""
    fault(account, "drop_after_commit", count=1)
    with pytest.raises(BROKEN):
        account.send("x", "5", key=key)

    assert account.total() == 5.0
    assert account.send("x", "5", key=key).headers["idempotent-replayed"] == "true"
    assert account.send("x", "5").status == 400


def test_a_truncated_answer_breaks_off_in_its_body(account):
    fault(account, "truncate", count=1)
    with pytest.raises(http.client.IncompleteRead) as broken:
        account.send("x", "5")

    assert 0 < len(broken.value.partial) < broken.value.expected + len(broken.value.partial)
    assert account.total() == 5.0


def test_conflicts_and_lock_timeouts_record_nothing(account):
    fault(account, "conflict_409", count=1)
    fault(account, "lock_timeout_429", count=1)
    first, second = account.send("x"), account.send("x")

    assert (first.status, second.status) == (409, 429)
    assert second.error["code"] == "lock_timeout"
    assert "stripe-rate-limited-reason" not in second.headers
    assert account.total() is None


def test_a_burst_of_429_ends_after_its_count(account):
    fault(account, "rate_limit_429", count=3, skip=1, reason="endpoint-rate")
    statuses = [account.send(f"{number}").status for number in range(5)]

    assert statuses == [200, 429, 429, 429, 200]
    assert applied(account) == [3]


def test_down_for_hours_of_the_clock(account):
    """Every request of the API breaks until the time has passed; the controls go on."""
    fault(account, "down", path="^/v[12]/", method="", for_s=30 * HOUR_S)
    account.client.advance(30 * HOUR_S - 1)
    with pytest.raises(BROKEN):
        account.client.get("/v1/customers")
    account.client.advance(1)

    assert account.client.get("/v1/customers").status == 200


def test_a_probability_is_drawn_from_its_seed(account):
    """The same script does the same again."""

    def run(number):
        account.client.request("DELETE", "/_sandbox/faults")
        fault(account, "conflict_409", probability=0.5, seed=7)
        return [account.send(f"{number}-{event}").status for event in range(20)]

    first, second = run(1), run(2)

    assert first == second
    assert set(first) == {200, 409}


def test_an_accepted_event_can_be_rejected_afterwards(account, key):
    fault(account, "reject_async", count=1, code="timestamp_in_future")
    accepted = account.send("x", "5", key=key)
    account.client.advance(20)
    (event,) = account.client.get("/v2/core/events", object_id=account.meter).body["data"]

    assert accepted.status == 200
    assert event["data"]["reason"]["error_types"][0]["code"] == "timestamp_in_future"
    assert account.total() is None


def test_a_fault_that_is_none_is_refused(account):
    refused = account.client.post_json("/_sandbox/faults", {"action": "explode"})

    assert refused.status == 400
    for wrong in (
        {"action": ["slow"]},
        {"action": "slow", "delay_s": -1},
        {"action": "reject_async", "code": []},
    ):
        assert account.client.post_json("/_sandbox/faults", wrong).status == 400
    assert account.client.post_json("/_sandbox/rules", {"async_codes": [["no_meter"]]}).status == 400


def test_time_does_not_go_back(account):
    assert account.client.post_json("/_sandbox/clock", {"set": account.client.now() - 1}).status == 400


def test_answers_are_dated_by_the_clock(account):
    """`Date` and `created` follow it, so that a sender can tell Stripe's time from its own."""
    account.client.advance_to(
        "2026-09-01T00:00:00Z" if account.client.now() < 1_788_220_800 else account.client.now()
    )
    answer = account.client.get("/v1/customers")
    customer = account.client.made("/v1/customers", {"name": "Now"})

    assert customer["created"] == account.client.now()
    assert (
        time.strptime(answer.headers["date"], "%a, %d %b %Y %H:%M:%S GMT")[:5]
        == time.gmtime(customer["created"])[:5]
    )
