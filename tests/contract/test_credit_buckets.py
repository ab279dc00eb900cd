"""The words of `CreditBuckets` mean the same on a real server and on the fake, awaited and in threads."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal

import pytest
from tests.valkey import TOPIC_ID, open_buckets, scripts_of, valkey

from meterline.domain.buckets import parse_balance
from meterline.domain.clients import QuotaPolicy
from meterline.local.ports import HOST, free_ports
from meterline.quota import (
    CreditBuckets,
    CreditsExhausted,
    FakeCreditBuckets,
    InvalidReservation,
    LeasePlan,
    Part,
    QuotaUnavailable,
    Reservation,
    ReservationConflict,
    ReservationLapsed,
)

M = 1_000_000
CLIENT = "acme"
BUDGET = 100
FAR_AHEAD_MS = 10**15


def deny(_client_id):
    return QuotaPolicy.DENY


def allow(_client_id):
    return QuotaPolicy.ALLOW


class Awaited:
    """The synchronous twin, so that one test can await both."""

    def __init__(self, buckets):
        self._buckets = buckets

    def __getattr__(self, name):
        async def call(*args, **options):
            return await asyncio.to_thread(getattr(self._buckets, name), *args, **options)

        return call


@asynccontextmanager
async def entered(connecting, *, in_threads):
    if not in_threads:
        async with connecting as buckets:
            yield buckets
        return
    twin = await asyncio.to_thread(connecting.__enter__)
    try:
        yield Awaited(twin)
    finally:
        await asyncio.to_thread(connecting.__exit__, None, None, None)


class RealWorld:
    """A server, and what the quota app would do to its buckets."""

    def __init__(self, url, namespace, *, in_threads):
        self._url, self._namespace, self._in_threads = url, namespace, in_threads

    async def open(self, stack, *, policy=deny, away=False):
        if away:
            self._url = f"redis://{HOST}:{free_ports(1)[0]}/0"
        else:
            await open_buckets(self._url, self._namespace, [(CLIENT, BUDGET * M)])
            self._scripts = await scripts_of(self._url, self._namespace)
            stack.push_async_callback(self._scripts.client.aclose)
        connecting = CreditBuckets.connect(self._url, namespace=self._namespace, policy=policy)
        return await stack.enter_async_context(entered(connecting, in_threads=self._in_threads))

    async def account(self, offset, life_micro):
        await self._scripts.run_ops(CLIENT, [["T", TOPIC_ID, 0, offset, life_micro]])

    async def expire(self):
        """The reservations of the tests live a few milliseconds."""
        await asyncio.sleep(0.02)
        progress = ("progress", 1, TOPIC_ID, 0, -1, FAR_AHEAD_MS)
        await self._scripts.on_shards(dict.fromkeys(range(64), progress))
        await self._scripts.run_ops(CLIENT, [["e"]])

    async def close_buckets(self):
        await open_buckets(self._url, self._namespace, generation=2)
        for shard in range(64):
            await self._scripts.client.hset(self._scripts.keys.state(shard), "open", 0)


class FakeWorld:
    """The fake, told the same."""

    def __init__(self, *, in_threads):
        self._in_threads = in_threads

    async def open(self, stack, *, policy=deny, away=False):
        self._fake = FakeCreditBuckets({CLIENT: BUDGET}, policy=policy)
        self._fake.is_away = away
        return await stack.enter_async_context(entered(self._fake, in_threads=self._in_threads))

    async def account(self, _offset, _life_micro):
        self._fake.account()

    async def expire(self):
        self._fake.expire()

    async def close_buckets(self):
        self._fake.is_closed = True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with valkey(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture(params=["server", "server, threads", "fake", "fake, threads"])
def world(request, unique):
    in_threads = request.param.endswith("threads")
    if request.param.startswith("fake"):
        return FakeWorld(in_threads=in_threads)
    return RealWorld(request.getfixturevalue("server").url, unique("buckets"), in_threads=in_threads)


def run(world, scenario, **options):
    async def whole():
        async with AsyncExitStack() as stack:
            await scenario(await world.open(stack, **options))

    asyncio.run(whole())


def part(offset, credits_micro):
    return Part(TOPIC_ID, 0, offset, credits_micro)


def amounts(balance):
    assert balance.available == (balance.granted - balance.consumed - balance.provisional - balance.reserved)
    return tuple(
        int(amount) for amount in (balance.consumed, balance.provisional, balance.reserved, balance.available)
    )


def test_reserved_credits_are_not_available(world):
    async def scenario(buckets):
        made = await buckets.reserve(CLIENT, Decimal("17.25"), reservation_id="task/1", ttl_s=30)

        assert made == Reservation(
            "task/1", CLIENT, 17_250_000, 30, made.generation, done=False, covered=True
        )
        balance = await buckets.balance(CLIENT)
        assert balance.reserved == Decimal("17.25")
        assert balance.available == Decimal("82.75")
        assert (balance.is_open, balance.period_start) == (True, None)

    run(world, scenario)


def test_the_same_reservation_again_is_the_same(world):
    async def scenario(buckets):
        first = await buckets.reserve(CLIENT, 10, reservation_id="task/1")

        assert await buckets.reserve(CLIENT, "10", reservation_id="task/1") == first
        assert amounts(await buckets.balance(CLIENT)) == (0, 0, 10, 90)

    run(world, scenario)


def test_an_id_with_another_amount_is_a_conflict_and_changes_nothing(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 10, reservation_id="task/1")

        with pytest.raises(ReservationConflict):
            await buckets.reserve(CLIENT, 11, reservation_id="task/1")
        with pytest.raises(ReservationConflict):
            await buckets.reserve("somebody-else", 10, reservation_id="task/1")
        assert amounts(await buckets.balance(CLIENT)) == (0, 0, 10, 90)

    run(world, scenario)


def test_too_few_credits_are_a_typed_refusal_that_leaves_no_trace(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 60, reservation_id="task/1")
        with pytest.raises(CreditsExhausted) as refused:
            await buckets.reserve(CLIENT, 41, reservation_id="task/2")

        error = refused.value
        assert (error.client_id, error.requested, error.available) == (CLIENT, Decimal(41), Decimal(40))
        assert error.shortfall == 1
        await buckets.void("task/1")
        assert (await buckets.reserve(CLIENT, 41, reservation_id="task/2")).covered

    run(world, scenario)


def test_settled_parts_are_provisional_until_the_log_accounts_them(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 20, reservation_id="task/1")

        await buckets.settle("task/1", [part(5, 7 * M)], final=False)
        assert amounts(await buckets.balance(CLIENT)) == (0, 7, 13, 80)
        await buckets.settle("task/1", [part(6, 3 * M)])
        assert amounts(await buckets.balance(CLIENT)) == (0, 10, 0, 90)
        await world.account(6, 10 * M)
        assert amounts(await buckets.balance(CLIENT)) == (10, 0, 0, 90)

    run(world, scenario)


def test_settling_again_counts_once(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 20, reservation_id="task/1")
        for _ in range(3):
            await buckets.settle("task/1", [part(5, 7 * M)], final=False)
        assert amounts(await buckets.balance(CLIENT)) == (0, 7, 13, 80)
        for _ in range(3):
            await buckets.settle("task/1", [part(5, 7 * M), part(6, 1 * M)])

        assert amounts(await buckets.balance(CLIENT)) == (0, 8, 0, 92)

    run(world, scenario)


def test_work_that_was_settled_is_reported_as_done(world):
    async def scenario(buckets):
        assert not (await buckets.reserve(CLIENT, 20, reservation_id="task/1")).done
        await buckets.settle("task/1", [part(5, 20 * M)])

        assert (await buckets.reserve(CLIENT, 20, reservation_id="task/1")).done
        assert amounts(await buckets.balance(CLIENT)) == (0, 20, 0, 80)

    run(world, scenario)


def test_a_voided_reservation_is_free_and_ended_for_good(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 20, reservation_id="task/1")
        await buckets.void("task/1")
        await buckets.void("task/1")

        assert amounts(await buckets.balance(CLIENT)) == (0, 0, 0, 100)
        with pytest.raises(ReservationLapsed):
            await buckets.reserve(CLIENT, 20, reservation_id="task/1")
        with pytest.raises(ReservationLapsed):
            await buckets.renew("task/1", 30)

    run(world, scenario)


def test_an_expired_reservation_is_ended_for_good(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 20, reservation_id="task/1", ttl_s=0.005)
        await world.expire()

        assert amounts(await buckets.balance(CLIENT)) == (0, 0, 0, 100)
        with pytest.raises(ReservationLapsed) as lapsed:
            await buckets.renew("task/1", 30)
        assert (lapsed.value.client_id, lapsed.value.reservation_id) == (CLIENT, "task/1")

    run(world, scenario)


def test_a_renewed_reservation_outlives_its_first_time(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 20, reservation_id="task/1", ttl_s=0.005)
        await buckets.renew("task/1", 3_600)
        if isinstance(world, RealWorld):  # the fake's `expire` ends everything
            time.sleep(0.02)  # noqa: ASYNC251 - nothing else runs
            await world.account(0, 0)

        assert amounts(await buckets.balance(CLIENT)) == (0, 0, 20, 80)

    run(world, scenario)


def test_late_work_of_an_ended_or_unknown_reservation_still_counts(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 20, reservation_id="task/1")
        await buckets.void("task/1")
        await buckets.settle("task/1", [part(5, 7 * M)])
        await buckets.settle("somebody's", [part(6, 2 * M)], client_id=CLIENT)

        assert amounts(await buckets.balance(CLIENT)) == (0, 9, 0, 91)

    run(world, scenario)


def test_a_reservation_of_another_process_needs_its_client_named(world):
    async def scenario(buckets):
        for call in (
            buckets.settle("unknown", [part(5, M)]),
            buckets.void("unknown"),
            buckets.renew("unknown", 30),
        ):
            with pytest.raises(InvalidReservation, match="client_id"):
                await call
        with pytest.raises(ReservationLapsed):
            await buckets.renew("unknown", 30, client_id=CLIENT)

    run(world, scenario)


def test_closed_buckets_reserve_nothing_but_take_what_was_done(world):
    async def scenario(buckets):
        await world.close_buckets()
        with pytest.raises(QuotaUnavailable, match="rebuilt"):
            await buckets.reserve(CLIENT, 1, reservation_id="task/1")

        await buckets.settle("earlier", [part(5, 7 * M)], client_id=CLIENT)
        balance = await buckets.balance(CLIENT)
        assert (balance.is_open, balance.provisional) == (False, 7)

    run(world, scenario)


def test_the_policy_may_allow_work_without_credits_while_buckets_are_closed(world):
    async def scenario(buckets):
        await world.close_buckets()

        made = await buckets.reserve(CLIENT, 1_000, reservation_id="task/1")
        assert (made.covered, made.done) == (False, False)
        await buckets.settle("task/1", [part(5, 7 * M)])
        assert (await buckets.balance(CLIENT)).provisional == 7

    run(world, scenario, policy=allow)


@pytest.mark.parametrize("policy", [deny, allow])
def test_the_policy_decides_while_nobody_answers(world, policy):
    async def scenario(buckets):
        if policy is allow:
            made = await buckets.reserve(CLIENT, 1_000, reservation_id="task/1")
            assert not made.covered
        else:
            with pytest.raises(QuotaUnavailable, match=CLIENT):
                await buckets.reserve(CLIENT, 1_000, reservation_id="task/1")
        with pytest.raises(QuotaUnavailable):
            await buckets.settle("task/1", [part(5, M)], client_id=CLIENT)
        with pytest.raises(QuotaUnavailable):
            await buckets.balance(CLIENT)

    run(world, scenario, policy=policy, away=True)


def test_many_reservations_in_one_call_are_decided_one_by_one(world):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 5, reservation_id="m/0")
        wanted = {"m/0": 5, "m/1": 30, "m/2": 90, "m/3": "20.5"}
        others = await buckets.reserve_many(CLIENT, wanted, 30)
        assert [(rid, type(why)) for rid, why in others.items()] == [("m/2", CreditsExhausted)]
        others = await buckets.reserve_many(CLIENT, {"m/0": 6, "m/1": 30})
        assert [(rid, type(why)) for rid, why in others.items()] == [("m/0", ReservationConflict)]
        assert (await buckets.balance(CLIENT)).reserved == Decimal("55.5")
        await buckets.settle_many(CLIENT, {"m/0": [part(1, 5 * M)], "m/1": [], "m/3": [part(2, 20 * M)]})
        assert (await buckets.reserve_many(CLIENT, {"m/0": 5}))["m/0"].done
        assert amounts(await buckets.balance(CLIENT)) == (0, 25, 0, 75)

    run(world, scenario)


def test_a_lease_tells_the_server_sums_and_the_books_are_exact(server, unique):
    """Parts on three partitions in no order, each settle twice; then the log accounts one after the other."""
    namespace = unique("sums")
    plan = LeasePlan(calls_per_s=20, share_max=0.5, ttl_s=10, interval_ms=2)

    async def settle_600(buckets):
        for first in range(0, 600, 100):
            wanted = {f"t/{number}": 1 for number in range(first, first + 100)}
            assert await buckets.reserve_many(CLIENT, wanted) == {}
            for some in range(3):  # each call of one partition, and one call of all
                ids = list(wanted)[some:40:3]
                named = {rid: (Part(TOPIC_ID, some, first + 99 - n, M // 2),) for n, rid in enumerate(ids)}
                await buckets.settle_many(CLIENT, named)
                await buckets.settle_many(CLIENT, named)
            named = {
                rid: (Part(TOPIC_ID, n % 3, first + 99 - n, M // 2),)
                for n, rid in enumerate(wanted)
                if n >= 40
            }
            await buckets.settle_many(CLIENT, named)
            await buckets.settle_many(CLIENT, named)

    async def scenario():
        await open_buckets(server.url, namespace, [(CLIENT, 1_000 * M)])
        scripts = await scripts_of(server.url, namespace)
        async with CreditBuckets.connect(server.url, namespace=namespace, leases=plan) as buckets:
            await settle_600(buckets)
        entries, stood = 0, []
        for partition in range(3):
            entries += await scripts.client.zcard(scripts.keys.provisional(TOPIC_ID, partition, CLIENT))
            life = sum(M // 2 for number in range(600) if number % 100 % 3 == partition)
            answers = await scripts.run_ops(CLIENT, [["b"], ["T", TOPIC_ID, partition, 1_000, life], ["b"]])
            stood += [parse_balance(answer)[1:5] for answer in (answers[0], answers[2])]
        await scripts.client.aclose()
        return [[micro // M for micro in amounts] for amounts in stood], entries

    stood, entries = asyncio.run(scenario())
    assert [stood[0], *stood[1::2]] == [
        [0, 300, 0, 700],
        [102, 198, 0, 700],
        [201, 99, 0, 700],
        [300, 0, 0, 700],
    ]
    assert entries < 300


@pytest.mark.parametrize(
    ("amount", "reservation_id", "ttl_s", "wrong"),
    [
        (1.5, "task/1", 60, "float"),
        (0, "task/1", 60, "more than 0"),
        (-1, "task/1", 60, "more than 0"),
        ("0.0000001", "task/1", 60, "finer"),
        (1, "", 60, "reservation_id"),
        (1, "x" * 201, 60, "201 bytes"),
        (1, "\ud83d", 60, "surrogate"),
        (1, "task/1", 0, "ttl_s"),
        (1, "task/1", 86_401, "ttl_s"),
    ],
)
def test_what_can_never_be_accepted_is_said_at_once(world, amount, reservation_id, ttl_s, wrong):
    async def scenario(buckets):
        with pytest.raises(InvalidReservation, match=wrong):
            await buckets.reserve(CLIENT, amount, reservation_id=reservation_id, ttl_s=ttl_s)
        assert amounts(await buckets.balance(CLIENT)) == (0, 0, 0, 100)

    run(world, scenario)


@pytest.mark.parametrize(
    "wrong",
    [
        Part("to pic", 0, 1, M),
        Part("", 0, 1, M),
        Part(TOPIC_ID, -1, 1, M),
        Part(TOPIC_ID, 0, -1, M),
        Part(TOPIC_ID, 0, 1, -M),
        Part(TOPIC_ID, 0, 1, 0.5),
        Part(TOPIC_ID, False, 1, M),  # noqa: FBT003 - what is tested
    ],
)
def test_a_part_is_a_position_and_an_amount(world, wrong):
    async def scenario(buckets):
        await buckets.reserve(CLIENT, 20, reservation_id="task/1")
        with pytest.raises(InvalidReservation, match="Part"):
            await buckets.settle("task/1", [wrong])
        assert amounts(await buckets.balance(CLIENT)) == (0, 0, 20, 80)

    run(world, scenario)


def test_ids_of_any_text_stay_apart(world):
    async def scenario(buckets):
        names = ["ä/1", "a\n1", 'q"1', "\\1", "😀/1", "%d", "{x}"]
        for name in names:
            await buckets.reserve(CLIENT, 1, reservation_id=name)
        await buckets.settle("😀/1", [part(3, M)])
        await buckets.void('q"1')

        assert amounts(await buckets.balance(CLIENT)) == (0, 1, len(names) - 2, 99 - (len(names) - 2))

    run(world, scenario)
