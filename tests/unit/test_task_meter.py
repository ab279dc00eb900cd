"""The meter as programs see it: the fake, the synchronous twin, and the real one without Kafka or Redis."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from meterline.domain.clients import QuotaPolicy
from meterline.domain.events import default_event_id
from meterline.errors import RetryLater, UserError
from meterline.producer import InvalidUsage
from meterline.quota import CreditsExhausted, FakeCreditBuckets, QuotaUnavailable
from meterline.settings import KafkaSettings, QuotaSettings, RedisSettings, Settings
from meterline.task import FakeMeter, Meter, SpoolFull

JOB = {"client_id": "acme", "sku": "gpu", "credits": 5, "correlation_id": "job-1"}


@pytest.fixture
def fake():
    return FakeMeter(FakeCreditBuckets({"acme": 10}))


def sold(fake):
    return [(event.sku, event.credits_micro // 1_000_000) for event in fake.published]


async def fail(meter, **changed):
    async with meter.task(**JOB | changed):
        raise ZeroDivisionError


async def available(fake):
    balance = await fake.buckets.balance("acme")
    return balance.available_micro // 1_000_000, balance.reserved_micro // 1_000_000


def test_the_fake_publishes_and_settles(fake):
    """A user's test sees the events and what is left, as the real thing would leave it."""

    async def main():
        async with fake as meter:
            async with meter.task(**JOB) as task:
                assert await available(fake) == (5, 5)
                task.charge(sku="gpu", credits=2)
                task.charge(sku="tokens", credits=1)
            return await available(fake)

    assert asyncio.run(main()) == (7, 0)
    assert sold(fake) == [("gpu", 2), ("tokens", 1)]
    assert fake.published[0].event_id == default_event_id("acme", "job-1", "gpu")


def test_the_fake_refuses_like_the_real_one(fake):
    """No credits, no work; an exception gives back what was set aside."""

    async def main():
        async with fake as meter:
            with pytest.raises(CreditsExhausted):
                await fail(meter, credits=11)
            with pytest.raises(ZeroDivisionError):
                await fail(meter)
            return await available(fake)

    assert asyncio.run(main()) == (10, 0)
    assert fake.published == []


def test_the_same_words_serve_threads(fake):
    """`with` instead of `async with`: the same events, refusals and balances."""
    with fake as meter:
        with meter.task(**JOB) as task:
            task.charge(sku="gpu", credits=2)
        with pytest.raises(CreditsExhausted), meter.task(**JOB | {"credits": 11}):
            raise AssertionError("it started")
        with suppress(ZeroDivisionError), meter.task(**JOB | {"correlation_id": "job-2"}) as task:
            task.charge(sku="gpu", credits=3)
            raise ZeroDivisionError
        with pytest.raises(InvalidUsage), meter.task(**JOB | {"credits": 0.5}):
            raise AssertionError("it started")
        meter.flush()

    assert sold(fake) == [("gpu", 2), ("gpu", 3)]
    assert asyncio.run(available(fake)) == (5, 0)


def test_many_threads_share_one_meter():
    """Every task is billed once; the credits are enough for exactly so many."""
    fake = FakeMeter(FakeCreditBuckets({"acme": 100}))

    def work(number):
        try:
            with meter.task(client_id="acme", sku="gpu", credits=1, correlation_id=f"job-{number}"):
                return True
        except CreditsExhausted:
            return False

    with fake as meter, ThreadPoolExecutor(16) as threads:
        done = list(threads.map(work, range(150)))

    assert sum(done) == 100
    assert len({event.correlation_id for event in fake.published}) == 100


def test_the_thread_of_the_twin_ends(fake):
    """A program that is done with it ends."""
    with fake:
        assert any(thread.name == "meterline-meter" for thread in threading.enumerate())
    assert not any(thread.name == "meterline-meter" for thread in threading.enumerate())


@pytest.fixture
def nowhere(tmp_path):
    """Settings for a Kafka and a Redis that aren't there: a port that is bound and on which nobody
    listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        yield Settings(
            kafka=KafkaSettings(bootstrap_servers=address),
            redis=RedisSettings(url=f"redis://{address}/0"),
            quota=QuotaSettings(spool_dir=str(tmp_path / "spool"), spool_bytes_max=2**20),
        )


def test_without_kafka_finished_work_is_kept(nowhere, tmp_path):
    """The block is left at once; leaving the meter leaves the rest to the next process, which waits for it,
    too."""
    buckets = FakeCreditBuckets({"acme": 10})

    async def main():
        async with Meter.connect(nowhere, buckets=buckets, close_timeout_s=0.1) as meter:
            async with meter.task(**JOB):
                pass
            with pytest.raises(RetryLater, match="it is in the spool"):
                await meter.flush(0.1)

    asyncio.run(main())
    with Meter.connect(nowhere, buckets=buckets, close_timeout_s=0.1) as meter, pytest.raises(RetryLater):
        meter.flush(0.1)

    assert len(list(tmp_path.glob("spool/slot-000/*.segment"))) >= 1
    assert list(buckets.held("acme").values()) == [5_000_000]  # settled when Kafka has it


def test_without_redis_the_policy_decides(nowhere):
    """Deny is the default for clients nobody knows; allowed work is kept and published like any other."""

    async def main(policy):
        async with (
            Meter.connect(nowhere, policy=policy, close_timeout_s=0) as meter,
            meter.task(**JOB),
        ):
            return "done"

    with pytest.raises(QuotaUnavailable):
        asyncio.run(main(None))
    assert asyncio.run(main(lambda _: QuotaPolicy.ALLOW)) == "done"


def test_at_the_spools_limit_new_work_is_refused(nowhere):
    """Before it starts, and before its credits are set aside."""
    buckets = FakeCreditBuckets({"acme": 10**6})
    attributes = {f"{n}": "v" * 4_000 for n in range(60)}

    async def main():
        async with Meter.connect(nowhere, buckets=buckets, close_timeout_s=0) as meter:
            for number in range(10):
                job = JOB | {"correlation_id": f"job-{number}", "attributes": attributes}
                async with meter.task(**job):
                    pass

    with pytest.raises(SpoolFull, match="SPOOL_BYTES_MAX"):
        asyncio.run(main())
    assert len(buckets.held("acme")) == 5


def test_a_spool_that_cannot_be_is_told_at_the_start(nowhere, tmp_path):
    """With the setting to change."""
    (tmp_path / "file").touch()
    if os.geteuid() == 0:
        path, error = tmp_path / "file" / "spool", RetryLater
    else:
        tmp_path.chmod(0o500)
        path, error = tmp_path / "new", UserError
    settings = nowhere.model_copy(update={"quota": QuotaSettings(spool_dir=str(path))})
    with pytest.raises(error, match="spool directory"), Meter.connect(settings, buckets=FakeCreditBuckets()):
        raise AssertionError("it started")
