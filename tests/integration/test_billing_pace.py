"""Two billing workers on one account with Stripe's limit of test mode: together they keep it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
from tests.sandbox_account import Account, SandboxClient

from meterline.billing.clock import StripeClock
from meterline.billing.outcomes import Answer
from meterline.billing.pace import USED_SHARE, Pace
from meterline.billing.send import StripeSender, stripe_client
from meterline.billing.stripe_reads import StripeReads
from meterline.domain.accounts import AccountKey
from meterline.domain.usage_records import UsageRecord
from meterline.local.sandbox.process import SandboxProcess
from meterline.settings import StripeSettings

pytestmark = pytest.mark.stack

LIMIT, PARTITIONS, SECONDS = 25, 4, 4
FLUSH_S = 0.15
SERVED_MIN = 0.75
"""Of the rate that may be used: a busy machine is late now and then, and that is not made up for."""


@pytest.fixture
def account(tmp_path):
    with SandboxProcess.start(tmp_path) as sandbox:
        client = SandboxClient(sandbox.url)
        account = Account(client)
        client.control("rules", rate_limit_per_s=LIMIT)
        yield account, StripeSettings(sandbox_url=sandbox.url)


class Worker:
    """What a billing worker has for Stripe; it has more to tell than it may, and asks something, too."""

    def __init__(self, name, settings, partitions):
        clock = StripeClock()
        pace = Pace(LIMIT)
        pace.partitions = PARTITIONS
        self.name, self.answers, self.told = name, Counter(), 0
        self.sender = StripeSender(stripe_client(settings, clock), pace, clock=clock)
        self.reads = StripeReads(stripe_client(settings, clock, pace))
        for partition in partitions:
            self.sender.own(partition)

    def record(self, account):
        self.told += 1
        here = {"client_id": "acme", "meter": "credits", "map_version": 1, "window_id": "00", "value": 1}
        now = int(time.time())
        return UsageRecord(
            identifier=f"mlur_{self.name}_{self.told}",
            customer=f"cus_{self.name}{self.told}",  # its own lane; unknown ones are taken at first
            event_name=account.event_name,
            event_timestamp=now,
            **dict.fromkeys(("period_start", "window_start", "source_partition", "cutoff_offset"), 0),
            **dict.fromkeys(("period_end", "window_end"), now * 1000),
            source_topic_id="topic",
            **here,
        )

    async def send(self, account):
        calls, end = [], time.monotonic() + SECONDS
        while time.monotonic() < end:
            for _ in range(self.sender.room()):
                record = self.record(account)
                assert self.sender.reserve(record.lane)
                calls.append(asyncio.ensure_future(self.sender.send(record, time.monotonic() + 3600)))
            await asyncio.sleep(FLUSH_S)
        for call in calls:
            call.cancel()
        for done in await asyncio.gather(*calls, return_exceptions=True):
            if not isinstance(done, asyncio.CancelledError):
                self.answers[done.answer] += 1

    async def ask(self, account):
        key = AccountKey("acme", "credits", 0, 86_400_000, account.customer)
        for _ in range(5):
            await self.reads.summary(key, account.event_name, 0, 60_000)

    def close(self):
        self.sender.close()
        self.reads.close()


def test_two_workers_and_their_reads_stay_within_the_limit_of_the_account(account):
    """Three partitions' share and one's: together they use the limit, and ask for no more.

    A sandbox that stalls counts what waited in one second: then a request may be refused, and is made again.
    """
    account, settings = account
    workers = [Worker("a", settings, [0, 1, 2]), Worker("b", settings, [3])]

    async def both():
        await asyncio.gather(*(one(account) for worker in workers for one in (worker.send, worker.ask)))

    asyncio.run(both())
    for worker in workers:
        worker.close()
    made = [sum(worker.answers.values()) for worker in workers]
    accepted = sum(worker.answers[Answer.ACCEPTED] for worker in workers)

    assert sum(made) <= LIMIT * SECONDS
    assert accepted >= LIMIT * USED_SHARE * SECONDS * SERVED_MIN
    assert made[0] > 2 * made[1]
