"""Each rule of a credit bucket by name, in credits, on the script and on the model: what may be spent.

The state machine compares the two with each other; here both are compared with the numbers of the rule.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.valkey import scripts_of, valkey

from meterline.domain.buckets import Bucket, Shard, parse_balance
from meterline.quota.keys import shard_of

CLIENT, TOPIC, PARTITIONS = "acme", "usage.events", 2
LONG, SHORT = 60_000, 1
FAR_AHEAD = 10**15


class OnModel:
    """The rules in Python."""

    async def __aenter__(self):
        self.shard = Shard()
        self.bucket = Bucket(self.shard)
        return self

    async def __aexit__(self, *_):
        pass

    async def ops(self, *batch):
        return [self.bucket.apply(op, time.time_ns() // 1_000_000) for op in batch]

    async def begin(self, generation):
        assert self.shard.begin(generation, partitions=PARTITIONS, topic_id=TOPIC, skew_ms=0) == "ok"

    async def open(self, generation):
        assert self.shard.open_up(generation) == "ok"

    async def progress(self, partition, published, accounted):
        generation = self.shard.generation
        assert self.shard.progress(generation, TOPIC, partition, published, accounted) == "ok"

    async def restart(self):
        self.shard.server_run = "after the restart"


class OnServer:
    """The script."""

    def __init__(self, url, namespace):
        self._url, self._namespace = url, namespace
        self._shard, self._generation = shard_of(CLIENT), 0

    async def __aenter__(self):
        self._scripts = await scripts_of(self._url, self._namespace)
        return self

    async def __aexit__(self, *_):
        await self._scripts.client.aclose()

    async def ops(self, *batch):
        return await self._scripts.run_ops(CLIENT, list(batch))

    async def begin(self, generation):
        self._generation = generation
        answer = await self._scripts.begin(
            self._shard, generation, partitions=PARTITIONS, topic_id=TOPIC, skew_ms=0
        )
        assert answer == "ok"

    async def open(self, generation):
        assert await self._scripts.open(self._shard, generation) == "ok"

    async def progress(self, partition, published, accounted):
        answer = await self._scripts.progress(
            self._shard, self._generation, TOPIC, partition, published, accounted
        )
        assert answer == "ok"

    async def restart(self):
        await self._scripts.client.hset(self._scripts.keys.state(self._shard), "run", "before the restart")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with valkey(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture(params=["script", "model"])
def bucket(request, unique):
    """An open bucket with 20 granted; the two differ in nothing a rule can see."""
    if request.param == "model":
        return OnModel()
    return OnServer(request.getfixturevalue("server").url, unique("rules"))


def run(bucket, scenario):
    async def whole():
        async with bucket as opened:
            await opened.begin(1)
            await opened.ops(["G", "first", 20])
            await opened.open(1)
            await scenario(opened)

    asyncio.run(whole())


async def amounts(bucket):
    """Consumed, provisional, reserved, available."""
    (answer,) = await bucket.ops(["b"])
    balance = parse_balance(answer)
    assert balance.available == (balance.granted - balance.consumed - balance.provisional - balance.reserved)
    return balance[1:5]


def part(offset, credits_micro, partition=0):
    return [TOPIC, partition, offset, credits_micro]


def word(answer):
    return answer.split(" ")[0]


def test_only_what_is_there_can_be_reserved(bucket):
    async def scenario(b):
        answers = await b.ops(
            ["r", "a", 15, LONG], ["r", "b", 6, LONG], ["r", "c", 5, LONG], ["r", "d", 1, LONG]
        )
        assert await amounts(b) == (0, 0, 20, 0)
        assert [word(answer) for answer in answers] == ["g", "r", "g", "r"]

    run(bucket, scenario)


def test_q1_a_hold_stands_until_the_log_has_passed_its_deadline(bucket):
    """On every partition, one that nobody has heard of included."""

    async def scenario(b):
        await b.ops(["r", "a", 10, SHORT])
        await asyncio.sleep(0.02)
        await b.ops(["e"])
        assert await amounts(b) == (0, 0, 10, 10)
        await b.progress(0, -1, FAR_AHEAD)
        await b.ops(["e"])
        assert await amounts(b) == (0, 0, 10, 10)
        await b.progress(1, -1, 5)
        await b.ops(["e"])
        assert await amounts(b) == (0, 0, 10, 10)
        await b.progress(1, -1, FAR_AHEAD)
        await b.ops(["e"])
        assert await amounts(b) == (0, 0, 0, 20)

    run(bucket, scenario)


def test_q2_each_part_lowers_the_hold_once_and_the_last_one_frees_the_rest(bucket):
    async def scenario(b):
        await b.ops(["r", "a", 10, LONG])
        for _ in range(2):
            await b.ops(["s", "a", [part(5, 3)], 0])
            assert await amounts(b) == (0, 3, 7, 10)
        await b.ops(["s", "a", [part(6, 1)], 1])
        assert await amounts(b) == (0, 4, 0, 16)

    run(bucket, scenario)


def test_q4_an_id_is_one_attempt_with_one_amount(bucket):
    """Ended, it covers nothing any more; held, it covers what it was asked for."""

    async def scenario(b):
        await b.ops(
            ["r", "void", 5, LONG], ["v", "void"], ["r", "done", 5, LONG], ["s", "done", [part(1, 5)], 1]
        )
        answers = await b.ops(["r", "void", 5, LONG], ["r", "done", 5, LONG])
        assert (await amounts(b), answers) == ((0, 5, 0, 15), ["t", "d"])
        answers = await b.ops(["r", "held", 5, LONG], ["r", "held", 5, LONG], ["r", "held", 9, LONG])
        assert (await amounts(b), [word(answer) for answer in answers]) == ((0, 5, 5, 10), ["g", "g", "x"])

    run(bucket, scenario)


def test_q5_what_the_progress_covers_is_not_provisional(bucket):
    """Settled before it or after it: the log has accounted it, in a total or as a duplicate."""

    async def scenario(b):
        await b.ops(["s", "a", [part(5, 3), part(9, 4)], 1])
        await b.progress(0, 5, 0)
        await b.ops(["e"])
        assert await amounts(b) == (0, 4, 0, 16)
        await b.ops(["s", "late", [part(4, 2)], 1])
        assert await amounts(b) == (0, 4, 0, 16)

    run(bucket, scenario)


def test_a_total_replaces_what_was_provisional_up_to_its_cutoff(bucket):
    async def scenario(b):
        await b.ops(["s", "a", [part(5, 3), part(9, 4), part(5, 2, partition=1)], 1])
        await b.ops(["T", TOPIC, 0, 5, 3])
        assert await amounts(b) == (3, 6, 0, 11)
        await b.ops(["s", "late", [part(4, 2)], 1])
        assert await amounts(b) == (3, 6, 0, 11)

    run(bucket, scenario)


def test_a_total_with_an_old_cutoff_gives_nothing_back(bucket):
    async def scenario(b):
        said = [["T", TOPIC, 0, *total] for total in ((5, 9), (4, 2), (5, 8), (5, 9))]
        answers = await b.ops(*said)
        assert (await amounts(b), answers) == ((9, 0, 0, 11), ["ok", "o", "!", "o"])

    run(bucket, scenario)


def test_q7_statements_of_a_lease_are_numbered_and_raise_what_is_there(bucket):
    """Late and repeated ones change nothing; a raise that can't be had leaves the lease as it is."""

    async def scenario(b):
        await b.ops(["r", "lease", 15, LONG])
        await b.ops(["l", "lease", 2, 6, [part(1, 9)], LONG, 1])
        assert await amounts(b) == (0, 9, 6, 5)
        for seq, hold in ((1, 11), (2, 7)):
            await b.ops(["l", "lease", seq, hold, [], LONG, 1])
            assert await amounts(b) == (0, 9, 6, 5)
        await b.ops(["l", "lease", 3, 12, [], LONG, 1])
        assert await amounts(b) == (0, 9, 6, 5)
        await b.ops(["l", "lease", 4, 11, [], LONG, 1])
        assert await amounts(b) == (0, 9, 11, 0)

    run(bucket, scenario)


def test_q7_a_lease_that_is_used_up_is_not_held_again(bucket):
    """What its parts were held for is used: to hold that once more is a raise, and nothing is left."""

    async def scenario(b):
        await b.ops(["r", "lease", 20, LONG])
        (answer,) = await b.ops(["l", "lease", 1, 20, [part(1, 12)], LONG, 1])
        assert (await amounts(b), answer.split()[2]) == ((0, 12, 8, 0), "8")

    run(bucket, scenario)


def test_q7_parts_of_a_lapsed_lease_count(bucket):
    async def scenario(b):
        (answer,) = await b.ops(["l", "lease", 1, 6, [part(1, 9)], LONG, 1])
        assert (await amounts(b), answer) == ((0, 9, 0, 11), "l")

    run(bucket, scenario)


def test_q8_a_new_generation_is_empty_and_grants_nothing_until_it_opens(bucket):
    """What was held and used before comes back from the log and by renewing, not from old keys."""

    async def scenario(b):
        await b.ops(["r", "a", 10, LONG], ["s", "a", [part(5, 3)], 0])
        await b.begin(2)
        await b.ops(["G", "first", 20])
        answers = await b.ops(["r", "b", 1, LONG], ["n", "a", 10, LONG, 1])
        assert (await amounts(b), [word(answer) for answer in answers]) == ((0, 0, 10, 10), ["c", "g"])
        await b.open(2)
        (answer,) = await b.ops(["r", "b", 1, LONG])
        assert (await amounts(b), word(answer)) == ((0, 0, 11, 9), "g")

    run(bucket, scenario)


def test_q8_a_restarted_server_grants_nothing(bucket):
    """It may have lost its last second: neither known nor new reservations cover any work."""

    async def scenario(b):
        await b.ops(["r", "a", 10, LONG])
        await b.restart()
        answers = await b.ops(["r", "a", 10, LONG], ["r", "b", 5, LONG])
        assert (await amounts(b), answers) == ((0, 0, 10, 10), ["c", "c"])

    run(bucket, scenario)


def test_q9_the_first_baseline_of_a_period_wins(bucket):
    """A second one of the period, or an old one, gives its budget to nobody."""

    async def scenario(b):
        await b.ops(["T", TOPIC, 0, 5, 9])
        answers = await b.ops(["P", 2, 9, 50], ["P", 2, 0, 60], ["P", 1, 0, 70])
        assert (await amounts(b), answers) == ((0, 0, 0, 50), ["ok", "o", "o"])
        await b.ops(["P", 3, 9, 5])
        assert await amounts(b) == (0, 0, 0, 5)

    run(bucket, scenario)


def test_a_grant_is_given_once(bucket):
    async def scenario(b):
        answers = await b.ops(["G", "second", 5], ["G", "second", 5], ["G", "first", 20])
        assert (await amounts(b), answers) == ((0, 0, 0, 25), ["ok", "o", "o"])

    run(bucket, scenario)
