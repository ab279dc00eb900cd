"""What billing reads back, through the real SDK from the sandbox: shapes, periods, finality, and the time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from tests.sandbox_account import DAY_S, HOUR_S, Account, SandboxClient

from meterline.billing.clock import StripeClock
from meterline.billing.send import stripe_client
from meterline.billing.stripe_reads import StripeReads
from meterline.domain.accounts import AccountKey
from meterline.errors import RetryLater
from meterline.local.sandbox.process import SandboxProcess
from meterline.settings import StripeSettings

pytestmark = pytest.mark.stack

START = "2026-01-31T10:00:00Z"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with SandboxProcess.start(tmp_path_factory.mktemp("sandbox"), clock=START) as running:
        yield SandboxClient(running.url), running.url


@pytest.fixture
def clock():
    return StripeClock()


@pytest.fixture
def reads(sandbox, clock):
    reads = StripeReads(stripe_client(StripeSettings(sandbox_url=sandbox[1]), clock))
    yield reads
    reads.close()


@pytest.fixture
def account(sandbox):
    return Account(sandbox[0]).subscribe(interval="day")


def key_of(account):
    start, end = account.period()
    return AccountKey("acme", "credits", start * 1000, end * 1000, account.customer)


def test_a_summary_is_of_the_customer_and_the_time_asked_for(account, reads):
    """In units; nothing there is 0."""
    key = key_of(account)
    account.use("in", "7", timestamp=key.period_start // 1000 + 61)
    hour = (key.period_start, key.period_start + HOUR_S * 1000)

    assert asyncio.run(reads.summary(key, account.event_name, *hour)) == 7
    later = (hour[1], hour[1] + 60_000)
    assert asyncio.run(reads.summary(key, account.event_name, *later)) == 0


def test_an_invoice_has_units_when_it_is_final(account, reads):
    """None before there is one; without units while it is a draft; then its own period's quantity."""
    key = key_of(account)
    account.use("in", "7", timestamp=key.period_start // 1000 + 61)
    assert asyncio.run(reads.invoice(key, account.event_name)) is None

    account.client.advance_to(key.period_end // 1000 + 60)
    draft = asyncio.run(reads.invoice(key, account.event_name))
    account.client.advance(HOUR_S)
    final = asyncio.run(reads.invoice(key, account.event_name))

    assert (draft.units, draft.problem, final.units, final.problem) == (None, "", 7, "")
    other = replace(key, period_start=key.period_start - 60_000)
    assert asyncio.run(reads.invoice(other, account.event_name)) is None


def test_a_subscription_with_another_period_is_told(account, reads, sandbox):
    """Its invoice would never match; as is a customer without one, and one that is billed twice."""
    key = key_of(account)
    assert asyncio.run(reads.subscription_problem(key, account.event_name)) == ""

    other = replace(key, period_end=key.period_end + DAY_S * 1000)
    assert asyncio.run(reads.subscription_problem(other, account.event_name)) == "other_period"

    alone = Account(sandbox[0])
    stranger = replace(key, customer=alone.customer)
    assert asyncio.run(reads.subscription_problem(stranger, account.event_name)) == "no_subscription"

    account.subscribe(interval="day")
    assert asyncio.run(reads.subscription_problem(key, account.event_name)) == "price_unusable"


def test_the_clock_follows_stripes(account, reads, clock):
    """With every answer: what Stripe forgets and refuses goes by its own time."""
    assert abs(clock.now_ms() - time.time() * 1000) < 5_000
    asyncio.run(reads.invoice(key_of(account), account.event_name))

    assert abs(clock.now_ms() // 1000 - account.client.now()) <= 5


def test_a_meter_that_is_not_there_is_asked_again_later(account, reads):
    """It may be created; nothing is decided without an answer."""
    with pytest.raises(RetryLater, match="no active meter"):
        asyncio.run(reads.summary(key_of(account), "no_such_meter", 0, 60_000))


def test_a_notice_names_the_request_that_was_rejected(account, reads):
    """Stripe had answered 200; the key of the request is how its record is found."""
    began = account.client.now()
    assert account.send("x", "7", customer="cus_nobody", key="mlur_1:2").status == 200
    account.client.advance(60)
    told = [(one.idempotency_key, one.why.split(":")[0]) for one in asyncio.run(reads.notices(began))]

    assert told == [("mlur_1:2", "meter_event_customer_not_found")]
    assert asyncio.run(reads.notices(account.client.now())) == []
