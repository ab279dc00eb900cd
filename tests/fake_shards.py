"""The quota app's Redis for tests, in memory: the shards and buckets of the model, and its troubles."""

from __future__ import annotations

from collections.abc import Callable

from meterline.domain.buckets import Bucket, Shard
from meterline.errors import RetryLater
from meterline.quota.keys import SHARDS, shard_of
from meterline.quota.scripts import ShardState

__all__ = ["FakeShards"]


class FakeShards:
    """Answers as `quota.shards.Shards` does.

    Attributes:
        away: every call raises.
        durable: appendfsync always.
        told: what was asked of it, in order, e.g. ("run", client, op), ("progress", topic, partition, time).
        before: called with the word before each call; a test lets something happen there.
    """

    def __init__(self):
        self.now = 1_000_000
        self.away = self.durable = False
        self.told: list[tuple] = []
        self.before: Callable[[str], None] = lambda _word: None
        self.touched: dict[str, bool] = {}
        self.forget()

    def forget(self):
        """FLUSHALL."""
        self.shards = [Shard() for _ in range(SHARDS)]
        self.buckets: dict[str, Bucket] = {}

    def restart(self):
        """Another process, with all that was there."""
        for shard in self.shards:
            shard.server_run += "+"

    def bucket(self, client_id):
        return self.buckets.setdefault(client_id, Bucket(self.shards[shard_of(client_id)]))

    def balance(self, client_id):
        return self.bucket(client_id).balance()

    def _ask(self, *words):
        self.before(words[0])
        if self.away:
            raise RetryLater("Redis is away")
        self.told.append(words)

    async def states(self):
        self._ask("states")
        return [
            ShardState(
                s.server_run,
                s.run,
                s.generation,
                s.open,
                s.beat_number,
                s.partitions,
                s.topic_id,
                s.skew_ms,
                dict(s.published_until),
                dict(s.accounted_until),
            )
            for s in self.shards
        ]

    async def begin(self, generation, *, partitions, topic_id, skew_ms):
        self._ask("begin", generation)
        answers = [
            s.begin(generation, partitions=partitions, topic_id=topic_id, skew_ms=skew_ms)
            for s in self.shards
        ]
        return set(answers) == {"ok"}

    async def adopt(self, generation, shards):
        self._ask("adopt", generation)
        for number in shards:
            self.shards[number].adopt(generation)

    async def beat(self, generation, number, *, partitions, topic_id):
        self._ask("beat", number)
        answers = [s.beat(generation, number, partitions=partitions, topic_id=topic_id) for s in self.shards]
        return all(a.startswith("ok ") and int(a[3:]) >= number - 1 for a in answers)

    async def progress(self, generations, statements):
        took = set(generations)
        for said in statements:
            self._ask("progress", said.topic_id, said.partition, said.accounted_until)
            for number, generation in generations.items():
                answer = self.shards[number].progress(
                    generation, said.topic_id, said.partition, said.published_until, said.accounted_until
                )
                took -= set() if answer == "ok" else {number}
        return sorted(took)

    async def open(self, generation, shards):
        self._ask("open", generation)
        for number in shards:
            self.shards[number].open_up(generation)

    async def run(self, calls):
        answers = []
        for client_id, ops in calls:
            for op in ops:
                self._ask("run", client_id, op)
            answers.append([self.bucket(client_id).apply(op, self.now) for op in ops])
        return answers

    async def lifetimes(self, client_id, generation):
        self._ask("lifetimes", client_id)
        bucket = self.bucket(client_id)
        return dict(bucket.totals) if bucket.generation == generation else {}

    async def due(self, _now_ms, _limit):
        self._ask("due")
        return list(self.buckets)

    async def take_touched(self, shards, _limit):
        self._ask("take_touched")
        found = {c: refused for c, refused in self.touched.items() if shard_of(c) in set(shards)}
        self.touched = {c: refused for c, refused in self.touched.items() if c not in found}
        return found

    async def is_durable(self):
        return self.durable
