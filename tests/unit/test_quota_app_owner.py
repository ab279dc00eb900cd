"""The owner of a partition of usage.totals: totals first, progress at the end, nothing lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from tests.fake_shards import FakeShards

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import progress_key, progress_to_record, total_key, total_to_record
from meterline.domain.totals import UsageProgress, UsageTotal
from meterline.domain.windows import SkuTotal
from meterline.errors import PartitionHalted
from meterline.quota.owner import QuotaOwner, QuotaParts
from meterline.quota.state import Meta, meta_key
from meterline.streaming.owner import LogRange

TOPIC = "events-id"
TOTALS, PROGRESS = RecordCodec("usage-total"), RecordCodec("usage-progress")
LOG = LogRange("cluster", "usage.totals", "totals-id", 1, 0, 1_000)


@dataclass
class Record:
    offset: int
    key: bytes
    value: bytes | None
    timestamp: int = 0
    headers: tuple = ()


@dataclass
class Setup:
    """An owner of partition 1, its Redis, and what it committed."""

    store: FakeShards = field(default_factory=FakeShards)
    commits: list = field(default_factory=list)
    now_s: float = 100.0
    next_offset: int = 0
    companion: object = None

    def __post_init__(self):
        parts = QuotaParts(
            self.store, TOTALS, PROGRESS, TOPIC, lambda _partition: self.companion, lambda: self.now_s
        )
        self.owner = QuotaOwner(1, parts)

    async def restored(self, state=None):
        async def commit(what):
            self.commits.append(what)

        assert await self.owner.restore(state or {}, LOG, commit) == 0
        return self

    def begin(self, generation=7):
        for shard in self.store.shards:
            shard.begin(generation, partitions=4, topic_id=TOPIC, skew_ms=0)

    def feed(self, key, value):
        self.owner.feed([Record(self.next_offset, key, value)])
        self.next_offset += 1

    def total(self, client_id, cutoff, life, topic_id=TOPIC):
        total = UsageTotal(topic_id, 1, client_id, cutoff, SkuTotal(1, life, 0, 0))
        self.feed(total_key(topic_id, 1, client_id), TOTALS.encode(total_to_record(total)))

    def progress(self, accounted, published=0):
        said = UsageProgress(TOPIC, 1, accounted, published)
        self.feed(progress_key(TOPIC, 1), PROGRESS.encode(progress_to_record(said)))

    async def flush(self, *, at_end):
        if at_end:
            self.owner.on_read_to_end()
        self.now_s += 10
        await self.owner.flush()

    def told(self, word):
        return [words for words in self.store.told if words[0] == word]


def run(test):
    asyncio.run(asyncio.wait_for(test(), 20))


def test_totals_are_told_before_the_progress():
    """Also where the log has the progress first: a compacted total stands behind its progress."""

    async def test():
        s = await Setup().restored()
        s.begin()
        s.progress(50)
        s.total("acme", 9, 700)
        await s.flush(at_end=True)

        words = [words[0] for words in s.store.told if words[0] in {"run", "progress"}]
        assert words == ["run", "progress"]
        assert s.store.balance("acme").consumed == 700

    run(test)


def test_progress_waits_for_the_end_of_the_log():
    """What lies behind it may replace totals that it speaks of (Q6); totals don't wait."""

    async def test():
        s = await Setup().restored()
        s.begin()
        s.total("acme", 5, 100)
        s.progress(50)
        await s.flush(at_end=False)
        assert (s.told("progress"), s.store.balance("acme").consumed) == ([], 100)

        s.total("acme", 9, 700)
        await s.flush(at_end=True)
        assert s.told("progress") == [("progress", TOPIC, 1, 50)]
        assert s.store.balance("acme").consumed == 700

    run(test)


def test_progress_that_came_after_the_end_was_seen_waits_for_the_next_end():
    """Being at the end once says nothing about what comes later."""

    async def test():
        s = await Setup().restored()
        s.begin()
        s.progress(50)
        await s.flush(at_end=True)
        s.progress(60)
        await s.flush(at_end=False)

        assert s.told("progress") == [("progress", TOPIC, 1, 50)]

    run(test)


def test_a_new_generation_gets_every_total_before_any_progress():
    """Its buckets are empty; a progress alone would say that nothing was used."""

    async def test():
        s = await Setup().restored()
        s.begin(7)
        s.total("acme", 5, 100)
        s.total("other", 6, 200)
        s.progress(50)
        await s.flush(at_end=True)
        s.begin(8)
        s.store.told.clear()
        await s.flush(at_end=False)

        assert [words[0] for words in s.store.told] == ["states", "run", "run", "progress"]
        assert [s.store.balance(client).consumed for client in ("acme", "other")] == [100, 200]
        assert all(shard.accounted_until == {(TOPIC, 1): 50} for shard in s.store.shards)

    run(test)


def test_a_generation_that_begins_in_between_is_told_everything_again():
    """Totals went into the old one; the progress is for the buckets that had them."""

    async def test():
        s = await Setup().restored()
        s.begin(7)
        s.total("acme", 5, 100)
        s.progress(50)
        s.store.before = lambda word: (
            s.begin(8) if word == "progress" and s.store.shards[0].generation == 7 else 0
        )
        await s.flush(at_end=True)
        assert s.store.shards[0].accounted_until == {}

        await s.flush(at_end=False)
        assert s.store.balance("acme").consumed == 100
        assert s.store.shards[0].accounted_until == {(TOPIC, 1): 50}

    run(test)


def test_nothing_is_lost_while_redis_is_away():
    """The statements stay in memory, the committed place stays where it is."""

    async def test():
        s = await Setup().restored()
        s.begin()
        s.store.away = True
        s.total("acme", 5, 100)
        s.progress(50)
        await s.flush(at_end=True)
        s.total("acme", 6, 150)
        await s.flush(at_end=False)
        assert [commit.applied_offset for commit in s.commits] == [-1]

        s.store.away = False
        await s.flush(at_end=False)
        assert s.store.balance("acme").consumed == 150
        assert s.told("progress") == [("progress", TOPIC, 1, 50)]
        assert [commit.applied_offset for commit in s.commits] == [-1, 2]

    run(test)


def test_an_older_statement_changes_nothing_and_a_contradiction_neither():
    """The first of one cutoff stands."""

    async def test():
        s = await Setup().restored()
        s.begin()
        s.total("acme", 9, 700)
        s.total("acme", 5, 100)
        s.total("acme", 9, 701)
        await s.flush(at_end=True)

        assert s.store.balance("acme").consumed == 700

    run(test)


def test_totals_of_a_former_source_topic_still_count():
    """What was used before the topic was made anew was used."""

    async def test():
        s = await Setup().restored()
        s.begin()
        s.total("acme", 9, 700, topic_id="former-id")
        s.total("acme", 3, 50)
        await s.flush(at_end=True)

        assert s.store.balance("acme").consumed == 750

    run(test)


def test_an_empty_partition_says_that_it_was_read():
    """The first generation opens when every partition was read; nothing is accounted by it."""

    async def test():
        s = await Setup().restored()
        s.begin()
        await s.flush(at_end=True)

        assert s.told("progress") == [("progress", TOPIC, 1, 0)]

    run(test)


def test_it_reads_from_the_first_record_whatever_is_committed():
    """A rebuild needs all of it."""

    async def test():
        state = {meta_key(1): Meta("totals-id", 500).to_bytes()}

        await Setup().restored(state)

    run(test)


@pytest.mark.parametrize(
    ("meta", "why"), [(Meta("former-id", 5), "recreated"), (Meta("totals-id", 1_000), "lost its end")]
)
def test_a_log_that_forgot_what_was_used_halts_the_partition(meta, why):
    """Going on would give clients credits back."""

    async def test():
        with pytest.raises(PartitionHalted, match=why):
            await Setup().restored({meta_key(1): meta.to_bytes()})

    run(test)


def test_a_record_that_is_no_statement_halts_the_partition():
    """A total that is passed over would be missing behind a progress that says it isn't."""

    async def test():
        s = await Setup().restored()
        s.feed(b"key", b"nonsense")

        with pytest.raises(PartitionHalted, match=r"usage\.totals-1 offset 0"):
            await s.flush(at_end=False)

    run(test)


class Companion:
    def __init__(self):
        self.calls = []
        self.failure = None

    def start(self, _state, commit):
        self.calls.append("start")
        self.commit = commit

    def check(self):
        if self.failure:
            raise self.failure

    def close(self):
        self.calls.append("close")


def test_the_companion_starts_with_the_first_flush_and_commits_where_the_partition_stands():
    """In a restore the engine doesn't yet commit for good."""

    async def test():
        companion = Companion()
        s = Setup(companion=companion)
        await s.restored({b"known": b"state"})
        assert companion.calls == []
        await s.flush(at_end=False)
        await companion.commit([(b"k", b"v")], ())
        s.owner.close()

        assert companion.calls == ["start", "close"]
        assert (s.commits[-1].changelog, s.commits[-1].applied_offset) == ([(b"k", b"v")], -1)

    run(test)


def test_a_companion_that_ended_ends_the_worker():
    """Nobody would guard the buckets."""

    async def test():
        s = Setup(companion=Companion())
        await s.restored()
        s.companion.failure = RuntimeError("ended")

        with pytest.raises(RuntimeError, match="ended"):
            await s.flush(at_end=False)

    run(test)
