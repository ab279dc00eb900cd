"""The guardian: generations, opening, grants, alerts and periods, on the model of the buckets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from tests.fake_shards import FakeShards

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import alert_from_record, grant_from_record
from meterline.contracts.topics import CREDIT_ALERTS, CREDIT_GRANTS
from meterline.domain.clients import Client, PeriodUnit
from meterline.domain.grants import CreditGrant, GrantKind, baseline_id
from meterline.errors import PartitionHalted, RetryLater
from meterline.quota.guardian import Guardian, GuardianParts
from meterline.quota.keys import SHARDS
from meterline.quota.state import ledger_key
from meterline.settings import QuotaSettings

TOPIC = "events-id"
TTL_MAX_MS, SKEW_MS = 60_000, 500
DAY_MS = 86_400_000
GRANTS, ALERTS = RecordCodec("credit-grant"), RecordCodec("credit-alert")


class FakeGrantLog:
    """credit.grants as a list that grows."""

    def __init__(self, records):
        self.records, self.position, self.records_max = records, 0, 1_000

    async def read(self):
        read = self.records[self.position :][: self.records_max]
        self.position += len(read)
        return read

    async def is_at_end(self):
        return self.position == len(self.records)


@dataclass
class Setup:
    """A guardian that is stepped by hand. `restart` makes the next one, from what this one committed."""

    store: FakeShards = field(default_factory=FakeShards)
    records: list = field(default_factory=list)
    clients: dict = field(default_factory=dict)
    committed: dict = field(default_factory=dict)
    outputs: list = field(default_factory=list)
    now_ms: int = 1_000_000
    partitions: int = 2
    fenced: bool = False

    def __post_init__(self):
        self.registry = SimpleNamespace(version=0, get=self.clients.get)
        self.restart()

    def restart(self):
        async def count():
            return self.partitions

        parts = GuardianParts(
            settings=QuotaSettings(reservation_ttl_max_s=TTL_MAX_MS / 1000, clock_skew_ms=SKEW_MS),
            store=self.store,
            open_grants=lambda: FakeGrantLog(self.records),
            clients=self.registry,
            writer=None,
            source_topic_id=TOPIC,
            count_partitions=count,
            grants_topic_id="grants-id",
            grant_codec=GRANTS,
            grant_partitions=1,
            alert_codec=ALERTS,
            alert_partitions=1,
            clock_ms=lambda: self.now_ms,
        )
        self.guardian = Guardian(0, parts)
        self.guardian.take_over(self.committed, self.commit)

    async def commit(self, changes, outputs):
        if self.fenced:
            raise asyncio.CancelledError
        self.store.told.append(("commit",))
        self.committed |= dict(changes)
        for output in outputs:
            self.outputs.append(output)
            if output.topic == CREDIT_GRANTS:
                self.publish(grant_from_record(GRANTS.decode(output.value)))

    def publish(self, grant):
        record = SimpleNamespace(partition=0, offset=len(self.records), timestamp=self.now_ms)
        self.records.append((record, grant))

    def give(self, client_id, amount, kind=GrantKind.PREPAID, **fields):
        grant_id = fields.pop("grant_id", f"grant-{len(self.records)}")
        self.publish(CreditGrant(grant_id, client_id, kind, amount, self.now_ms, "test", "why", **fields))

    def account(self, until_ms):
        """As the owners do: in the present generation."""
        for shard in self.store.shards:
            for partition in range(self.partitions):
                shard.progress(shard.generation, TOPIC, partition, 0, until_ms)

    async def step(self):
        """A second goes by."""
        self.now_ms += 1_000
        self.store.now = self.now_ms
        keeper = self.guardian._keeper
        await keeper.read()
        while await keeper.read() or not keeper.is_complete:
            await keeper.tell()
        await self.guardian.tick()

    async def opened(self):
        """Open, as a first generation is: at once when all is read."""
        await self.step()
        self.account(0)
        await self.step()
        assert self.is_open
        return self

    @property
    def is_open(self):
        return all(shard.open for shard in self.store.shards)

    @property
    def generation(self):
        (generation,) = {shard.generation for shard in self.store.shards}
        return generation

    @property
    def alerts(self):
        found = [alert_from_record(ALERTS.decode(o.value)) for o in self.outputs if o.topic == CREDIT_ALERTS]
        return [(alert.client_id, alert.level_percent) for alert in found]

    @property
    def baselines(self):
        return [grant for _, grant in self.records if grant.kind is GrantKind.BASELINE]


def run(test):
    asyncio.run(asyncio.wait_for(test(), 30))


# -- generations


def test_the_first_generation_opens_when_every_partition_was_read():
    """There were no holds: nothing is waited for but both topics."""

    async def test():
        s = Setup()
        s.give("acme", 100)
        await s.step()
        shard = s.store.shards[0]
        shard.progress(shard.generation, TOPIC, 0, -1, 0)
        await s.step()
        assert not s.is_open  # of partition 1 nothing was heard

        s.account(0)
        await s.step()
        assert s.is_open
        assert s.store.balance("acme").available == 100

    run(test)


def lose_all(s):
    s.store.forget()


def lose_one_shard(s):
    s.store.shards[9].generation = 0


def restart(s):
    s.store.restart()


def roll_back(s):
    for shard in s.store.shards:
        shard.beat_number -= 1


def another_generation(s):
    for shard in s.store.shards:
        shard.generation += 5


@pytest.mark.parametrize("loss", [lose_all, lose_one_shard, restart, roll_back, another_generation])
def test_whatever_may_have_lost_something_closes_the_buckets_until_the_last_hold_is_over(loss):
    """A new generation, told all grants again, opened when the log has passed every forgotten deadline."""

    async def test():
        s = await Setup().opened()
        s.give("acme", 100)
        await s.step()
        before = s.generation
        loss(s)
        await s.step()
        closed_at = s.now_ms
        assert s.generation > before

        s.account(closed_at + TTL_MAX_MS + SKEW_MS - 1)
        await s.step()
        assert not s.is_open
        assert s.store.balance("acme").granted == 100
        s.account(closed_at + TTL_MAX_MS + SKEW_MS)
        await s.step()
        assert s.is_open
        assert all(shard.trusted for shard in s.store.shards)

    run(test)


def test_a_restart_that_lost_nothing_goes_on():
    """Every write was on disk before its answer, and no heartbeat is missing."""

    async def test():
        s = Setup()
        s.store.durable = True
        await s.opened()
        generation = s.generation
        s.store.restart()
        await s.step()

        assert (s.generation, s.is_open) == (generation, True)
        assert all(shard.trusted for shard in s.store.shards)

    run(test)


@pytest.mark.parametrize("loss", [lose_all, roll_back])
def test_durability_excuses_a_restart_only(loss):
    """What is missing is missing, whatever the server promises."""

    async def test():
        s = Setup()
        s.store.durable = True
        await s.opened()
        generation = s.generation
        loss(s)
        s.store.restart()
        await s.step()

        assert s.generation > generation

    run(test)


def test_durability_counts_from_the_generations_begin():
    """A server that was made durable later may have lost what was written before."""

    async def test():
        s = await Setup().opened()
        generation = s.generation
        s.store.durable = True
        s.store.restart()
        await s.step()

        assert s.generation > generation

    run(test)


def test_a_generation_is_remembered_before_it_begins():
    """Or a stalled guardian could empty the buckets of its successor."""

    async def test():
        s = Setup()
        await s.step()
        words = [words[0] for words in s.store.told]
        assert words.index("commit") < words.index("begin")

        s = Setup(fenced=True)
        with pytest.raises(asyncio.CancelledError):
            await s.step()
        assert not [words for words in s.store.told if words[0] == "begin"]

    run(test)


def test_the_next_guardian_goes_on_with_open_buckets():
    """A new owner of the partition is no reason to rebuild."""

    async def test():
        s = await Setup().opened()
        generation = s.generation
        s.restart()
        await s.step()

        assert (s.generation, s.is_open) == (generation, True)

    run(test)


def test_a_lost_changelog_does_not_make_a_first_generation():
    """Redis knows of one: its holds may be out, so the log must pass them."""

    async def test():
        s = await Setup().opened()
        s.committed.clear()
        s.restart()
        await s.step()
        s.account(s.now_ms)
        await s.step()

        assert not s.is_open

    run(test)


def test_buckets_stay_closed_until_the_grants_are_told():
    """A refusal for credits that are only not told yet would be wrong."""

    async def test():
        s = Setup()
        await s.step()
        s.account(0)
        s.give("acme", 100)
        s.store.before = lambda word: s.give("late", 5) if word == "beat" and len(s.records) == 1 else None
        await s.step()
        assert not s.is_open
        await s.step()

        assert s.is_open

    run(test)


def test_more_partitions_are_waited_for():
    """A partition nobody has accounted may hold the event of a hold (Q1)."""

    async def test():
        s = await Setup().opened()
        s.give("acme", 100)
        await s.step()
        s.store.bucket("acme").apply(["r", "task", 10, 1_000], s.now_ms)
        s.partitions = 3
        await s.step()
        for shard in s.store.shards:
            for partition in range(2):
                shard.progress(shard.generation, TOPIC, partition, 0, s.now_ms + DAY_MS)
        s.now_ms += DAY_MS
        await s.step()
        assert s.store.balance("acme").reserved == 10

        s.account(s.now_ms)
        await s.step()
        assert s.store.balance("acme").reserved == 0

    run(test)


# -- grants


def test_a_restarted_guardian_gives_nothing_twice_to_a_rebuilt_bucket():
    """The rebuilt bucket never heard of an extra that ended with its period; told now, it would count."""

    async def test():
        s = await Setup().opened()
        s.give("acme", 70)
        s.give("acme", 100, GrantKind.BASELINE, period_start=5, period_end=9, grant_id="b")
        s.give("acme", 3)
        await s.step()
        assert s.store.balance("acme").granted == 103
        s.store.forget()
        await s.step()
        await s.step()
        assert s.store.balance("acme").granted == 103
        s.restart()
        s.guardian._grants.records_max = 1
        for _ in s.records:  # between two reads it is busy with everything else
            await s.guardian._keeper.read()
            await s.guardian.tick()
        await s.step()

        assert s.store.balance("acme").granted == 103

    run(test)


def test_a_recreated_grants_topic_halts_the_partition():
    """Every client's credits would be gone."""
    s = Setup()
    s.committed[ledger_key(0)] = b'{"topic_id": "former", "offsets": {"0": 4}}'

    with pytest.raises(PartitionHalted, match="recreated"):
        s.restart()


# -- alerts


def use(s, client_id, life):
    bucket = s.store.bucket(client_id)
    cutoff = max((cutoff for cutoff, _ in bucket.totals.values()), default=0) + 1
    assert bucket.total(TOPIC, 0, cutoff, life) == "ok"
    s.store.touched[client_id] = False


def test_each_level_is_told_once_until_more_is_granted():
    """However many totals come, and whoever guards; a top-up of prepaid credits arms all levels."""

    async def test():
        s = Setup(clients={"acme": Client("acme", alert_levels_percent=(50, 80))})
        await s.opened()
        s.give("acme", 100)
        for life in (10, 49, 50, 60, 85, 90, 120):
            use(s, "acme", life)
            await s.step()
            s.restart()
        assert s.alerts == [("acme", 50), ("acme", 80), ("acme", 100)]

        s.give("acme", 100)
        use(s, "acme", 121)
        await s.step()
        assert s.alerts[3:] == [("acme", 50)]

    run(test)


def test_a_lost_redis_repeats_no_alert():
    """What was told stands in the changelog."""

    async def test():
        s = await Setup().opened()
        s.give("acme", 100)
        use(s, "acme", 100)
        await s.step()
        s.store.forget()
        await s.step()
        use(s, "acme", 100)
        s.account(s.now_ms + TTL_MAX_MS + SKEW_MS)
        await s.step()
        await s.step()

        assert s.is_open
        assert s.alerts == [("acme", 100)]

    run(test)


def test_work_that_is_refused_with_nothing_held_means_exhausted():
    """2 are left and every task wants more; but a refusal beside a hold may pass when the hold comes back."""

    async def test():
        s = await Setup().opened()
        s.give("acme", 10)
        await s.step()
        use(s, "acme", 8)
        s.store.bucket("acme").apply(["r", "task", 1, 1_000], s.now_ms)
        s.store.touched["acme"] = True
        await s.step()
        assert s.alerts == []

        s.store.bucket("acme").apply(["v", "task"], s.now_ms)
        s.store.touched["acme"] = False
        await s.step()
        assert s.alerts == []  # nobody was refused since
        s.store.touched["acme"] = True
        await s.step()
        assert s.alerts == [("acme", 100)]

    run(test)


def test_closed_buckets_raise_no_alert():
    """Half of the grants are told: it would look like exhaustion."""

    async def test():
        s = Setup()
        await s.step()
        s.give("acme", 10)
        use(s, "acme", 10)
        await s.step()
        assert s.alerts == []

        s.account(0)
        await s.step()  # opens
        await s.step()
        assert s.alerts == [("acme", 100)]

    run(test)


def test_a_touched_client_is_not_forgotten_when_redis_goes_away():
    """It was taken off the list; the answer didn't come."""

    async def test():
        s = await Setup().opened()
        s.give("acme", 10)
        await s.step()
        use(s, "acme", 10)
        s.store.touched.clear()
        s.store.before = lambda word: setattr(s.store, "away", word == "take_touched")
        with pytest.raises(RetryLater):
            await s.step()
        s.store.before, s.store.away = (lambda _word: None), False
        await s.step()

        assert s.alerts == [("acme", 100)]

    run(test)


# -- periods


def daily(client_id, anchor):
    return Client(client_id, period_unit=PeriodUnit.DAY, period_anchor=anchor)


def test_a_period_begins_when_the_logs_clock_passes_its_start():
    """With a baseline of the bucket's totals; the worker's own clock begins nothing (Q9)."""

    async def test():
        boundary = 10 * DAY_MS
        s = Setup(clients={"acme": daily("acme", boundary)}, now_ms=boundary)
        await s.opened()
        use(s, "acme", 30)
        s.give("acme", 100, GrantKind.BUDGET, period_start=boundary - DAY_MS)
        s.account(boundary - 1)
        await s.step()
        await s.step()
        assert s.store.balance("acme")[:2] == (100, 0)
        use(s, "acme", 75)
        await s.step()
        assert s.store.balance("acme")[:2] == (100, 45)

        s.account(boundary)
        for _ in range(3):
            await s.step()
        first, second = s.baselines
        assert (first.base_micro, second.base_micro) == (30, 75)
        assert second.grant_id == baseline_id("acme", boundary)
        assert s.store.balance("acme")[:2] == (100, 0)
        assert s.store.balance("acme").period_start == boundary

    run(test)


def test_a_redis_that_is_emptied_meanwhile_gives_no_baseline():
    """Its base would be nothing, for ever: the first in the log wins."""

    async def test():
        boundary = 10 * DAY_MS
        s = Setup(clients={"acme": daily("acme", boundary)}, now_ms=boundary)
        await s.opened()
        use(s, "acme", 30)
        s.give("acme", 100, GrantKind.BUDGET, period_start=boundary)
        s.account(boundary)
        s.store.before = lambda word: s.store.forget() if word == "lifetimes" else None
        with pytest.raises(RetryLater):
            await s.step()
        assert s.baselines == []

        s.store.before = lambda _word: None
        await s.step()
        use(s, "acme", 30)
        s.account(s.now_ms + TTL_MAX_MS + SKEW_MS)
        await s.step()
        assert [baseline.base_micro for baseline in s.baselines] == [30]

    run(test)


def test_no_period_begins_while_a_partition_is_unheard_of():
    """Its totals would be missing in the base."""

    async def test():
        s = Setup(now_ms=10 * DAY_MS)
        s.give("acme", 100, GrantKind.BUDGET, period_start=0)
        await s.step()
        for shard in s.store.shards:
            shard.progress(shard.generation, TOPIC, 0, 0, s.now_ms)
        await s.step()

        assert s.baselines == []

    run(test)


def test_an_extra_is_for_its_own_period():
    """A prepaid grant to a client with a budget adds to the present period."""

    async def test():
        boundary = 10 * DAY_MS
        s = Setup(clients={"acme": daily("acme", boundary)}, now_ms=boundary)
        await s.opened()
        s.give("acme", 100, GrantKind.BUDGET, period_start=boundary)
        s.account(boundary)
        await s.step()
        s.give("acme", 7)
        await s.step()
        assert s.store.balance("acme").granted == 107
        s.account(boundary + DAY_MS)
        await s.step()
        await s.step()

        assert s.store.balance("acme").granted == 100

    run(test)


def test_a_changed_registry_is_looked_at():
    """A client that gets other periods has them from the next look on."""

    async def test():
        day = 10 * DAY_MS
        s = Setup(clients={"acme": Client("acme")}, now_ms=day)
        await s.opened()
        s.give("acme", 100, GrantKind.BUDGET, period_start=0)
        s.account(day)
        await s.step()
        await s.step()
        assert [baseline.period_start for baseline in s.baselines] == [0]  # the month

        s.clients["acme"] = daily("acme", 0)
        s.registry.version += 1
        await s.step()
        assert [baseline.period_start for baseline in s.baselines] == [0, day]

    run(test)


def test_every_shard_has_a_heartbeat():
    """One that has none could be rolled back unseen."""

    async def test():
        s = await Setup().opened()
        await s.step()

        beats = [shard.beat_number for shard in s.store.shards]
        assert len(beats) == SHARDS
        assert set(beats) == {2}

    run(test)
