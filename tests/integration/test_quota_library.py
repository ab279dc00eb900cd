"""`CreditBuckets` and a server that is killed, restarted, frozen or set up wrongly."""

from __future__ import annotations

import asyncio
import time

import pytest
from redis import Redis
from redis.asyncio.cluster import RedisCluster
from redis.crc import key_slot
from tests.valkey import open_buckets, scripts_of, valkey

from meterline.domain.clients import QuotaPolicy
from meterline.domain.credits import MICRO
from meterline.errors import UserError
from meterline.local.ports import HOST, free_ports
from meterline.quota import CreditBuckets, CreditsExhausted, QuotaUnavailable
from meterline.quota.keys import SHARDS, shard_of

M = 1_000_000
NAMESPACE = "library"


def policy(client_id):
    return QuotaPolicy.ALLOW if client_id == "trusted" else QuotaPolicy.DENY


async def until_decided(buckets, client_id, reservation_id):
    async with asyncio.timeout(20):
        while True:
            try:
                return await buckets.reserve(client_id, 1, reservation_id=reservation_id)
            except QuotaUnavailable:
                await asyncio.sleep(0.02)


def test_a_restarted_server_is_not_believed_until_the_quota_app_says_so(tmp_path):
    """Also under load, and though the data are there: what the last second held may be gone."""

    async def scenario(server):
        await open_buckets(server.url, NAMESPACE, [("acme", 1_000 * M)])
        async with CreditBuckets.connect(server.url, namespace=NAMESPACE, timeout_ms=2_000) as buckets:
            stop = asyncio.Event()

            async def busy(name):
                number = 0
                while not stop.is_set():
                    number += 1
                    try:
                        await buckets.reserve("acme", 1, reservation_id=f"{name}/{number}")
                        await buckets.void(f"{name}/{number}")
                    except QuotaUnavailable:
                        await asyncio.sleep(0.005)

            tasks = [asyncio.create_task(busy(f"task-{n}")) for n in range(8)]
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(20):
                while True:
                    try:
                        balance = await buckets.balance("acme")
                        break
                    except QuotaUnavailable:
                        await asyncio.sleep(0.02)
            assert (balance.is_open, balance.granted) == (False, 1_000)
            with pytest.raises(QuotaUnavailable, match="rebuilt"):
                await buckets.reserve("acme", 1, reservation_id="after")
            stop.set()
            await asyncio.gather(*tasks)

            scripts = await scripts_of(server.url, NAMESPACE)
            await scripts.on_shards(dict.fromkeys(range(SHARDS), ("adopt", 1)))
            await scripts.client.aclose()
            assert (await buckets.reserve("acme", 1, reservation_id="after")).covered

    with valkey(tmp_path) as server:
        asyncio.run(scenario(server))


def test_a_server_that_does_not_answer_costs_its_time_and_then_none(tmp_path):
    async def scenario(server):
        await open_buckets(server.url, NAMESPACE, [("acme", 10 * M), ("trusted", 10 * M)])
        connecting = CreditBuckets.connect(server.url, namespace=NAMESPACE, timeout_ms=500, policy=policy)
        async with connecting as buckets:
            assert (await until_decided(buckets, "acme", "before")).covered
            server.freeze()
            started = time.monotonic()
            with pytest.raises(QuotaUnavailable, match="500 ms"):
                await buckets.reserve("acme", 1, reservation_id="a/1")
            assert 0.4 < time.monotonic() - started < 2
            for number in range(2, 4):
                assert not (await buckets.reserve("trusted", 1, reservation_id=f"t/{number}")).covered

            started = time.monotonic()  # the breaker is open: nobody waits any more
            for number in range(4, 100):
                assert not (await buckets.reserve("trusted", 1, reservation_id=f"t/{number}")).covered
            assert time.monotonic() - started < 0.5
            server.thaw()
            assert (await until_decided(buckets, "acme", "a/1")).covered
            # Work that was allowed meanwhile is set aside from now on, as long as it runs.
            await buckets.renew("t/5", 30)

    with valkey(tmp_path) as server:
        asyncio.run(scenario(server))


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"appendonly": "no"}, "append-only"), ({"maxmemory_policy": "allkeys-lru"}, "evicts")],
)
def test_a_server_that_may_forget_credits_is_refused(tmp_path, options, wrong):
    async def scenario(server):
        with pytest.raises(UserError, match=wrong):
            async with CreditBuckets.connect(server.url):
                pass

    with valkey(tmp_path, **options) as server:
        asyncio.run(scenario(server))


def test_each_client_is_decided_by_the_server_of_the_cluster_that_has_its_credits(tmp_path):
    """Also when slots move to a server nobody knew of, and while one of them is away."""

    def in_cluster(number):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        return valkey(folder, cluster_enabled="yes", cluster_port=f"{free_ports(1)[0]}")

    async def scenario(first, second):
        here, there = of_slots(0, HALF - 1), of_slots(HALF, 16383)
        async with CreditBuckets.connect(first.url) as early:
            with Redis.from_url(first.url) as one, Redis.from_url(second.url) as two:
                share_slots(one, two, second)
            await open_buckets(
                first.url, "meterline", [(here, 5 * MICRO), (there, 7 * MICRO)], client=RedisCluster
            )
            with pytest.raises(QuotaUnavailable, match="another server"):
                await early.reserve(there, 3, reservation_id="there/1")
            await decided(early, there, "there/1")
            await early.reserve(here, 5, reservation_id="here/1")
            with pytest.raises(CreditsExhausted):
                await early.reserve(here, 1, reservation_id="here/2")
            async with CreditBuckets.connect(second.url) as late:
                balances = [(await late.balance(client)).available for client in (here, there)]
                second.kill()
                with pytest.raises(QuotaUnavailable):
                    await late.reserve(there, 1, reservation_id="there/2")
                await late.void("here/1", client_id=here)
                await late.reserve(here, 2, reservation_id="here/3")
            return balances

    with in_cluster(1) as first, in_cluster(2) as second:
        with Redis.from_url(first.url) as one:
            one.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: one.cluster("INFO")["cluster_state"] == "ok")
        assert asyncio.run(scenario(first, second)) == [0, 4]


HALF = 8192


def share_slots(one, two, second):
    """The upper half of the slots, empty yet, goes to the second server."""
    one.execute_command("CLUSTER DELSLOTSRANGE", HALF, 16383)
    two.execute_command("CLUSTER ADDSLOTSRANGE", HALF, 16383)
    one.execute_command("CLUSTER MEET", HOST, second.port, int(second._options["cluster-port"]))
    two.execute_command("CLUSTER BUMPEPOCH")
    for server in (one, two):
        wait_until(lambda server=server: server.cluster("INFO")["cluster_size"] == "2")
        wait_until(lambda server=server: server.cluster("INFO")["cluster_state"] == "ok")


def of_slots(first, last):
    """A client whose keys are in these slots."""
    return next(
        name
        for name in map("client-{}".format, range(100))
        if first <= key_slot(b"{%02d}" % shard_of(name)) <= last
    )


async def decided(buckets, client_id, reservation_id):
    """Reserve 3 credits as soon as somebody decides."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return await buckets.reserve(client_id, 3, reservation_id=reservation_id)
        except QuotaUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


def wait_until(is_so):
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_wrong_address_and_a_wrong_password_are_said_at_once(tmp_path):
    async def refused(url):
        with pytest.raises(UserError) as error:
            async with CreditBuckets.connect(url):
                pass
        return str(error.value)

    with valkey(tmp_path, requirepass="secret") as server:
        wrong = server.url.replace("redis://", "redis://:guess@")
        assert "refuses to let us in" in asyncio.run(refused(wrong))
    assert "address" in asyncio.run(refused("http://example.org"))
