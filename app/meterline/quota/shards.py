"""What the quota app asks of Redis, all shards at a time. Each call raises RetryLater while it is away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from meterline.domain.totals import UsageProgress
from meterline.errors import RetryLater, UserError
from meterline.quota.keys import SHARDS
from meterline.quota.scripts import TROUBLE, Scripts, ShardState
from meterline.settings import RedisSettings

__all__ = ["Op", "Shards", "open_shards"]

Op = Sequence[Any]
"""One operation of the bucket script; `domain.buckets` has the words."""

ANSWER_S_MAX = 5.0
"""A server that says nothing for so long counts as away. A script takes milliseconds."""


class Shards:
    """The buckets of one installation."""

    def __init__(self, client: Redis | RedisCluster, namespace: str) -> None:
        self._client: Any = client
        self._scripts = Scripts(client, namespace=namespace)
        self._keys = self._scripts.keys

    async def prepare(self) -> None:
        """Refuse a wrong server early.

        Raises:
            UserError: it is too old, or refuses us.
        """
        await self._scripts.prepare()

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()

    # -- shards

    async def states(self) -> list[ShardState]:
        """The state of every shard; a generation of 0: there is none."""
        return await self._scripts.look_at_all()

    async def begin(self, generation: int, *, partitions: int, topic_id: str, skew_ms: int) -> bool:
        """Begin a new, closed generation everywhere. False: one as new is known somewhere."""
        answers = await self._everywhere("begin", generation, partitions, topic_id, skew_ms)
        return all(answer == "ok" for answer in answers.values())

    async def adopt(self, generation: int, shards: Iterable[int]) -> None:
        """Let the generation go on under the server's new run id."""
        await self._scripts.on_shards({shard: ["adopt", generation] for shard in shards})

    async def beat(self, generation: int, number: int, *, partitions: int, topic_id: str) -> bool:
        """Write the heartbeat everywhere.

        Returns:
            False: a shard isn't of this generation, was restarted or rolled back. A look at the states tells.
        """
        answers = await self._everywhere("beat", generation, number, partitions, topic_id)
        # The number before, in the answer: a server that went back since we looked says so.
        return all(answer.startswith("ok ") and int(answer[3:]) >= number - 1 for answer in answers.values())

    async def progress(
        self, generations: Mapping[int, int], statements: Iterable[UsageProgress]
    ) -> list[int]:
        """Tell shards of these generations how far the log is accounted; the shards that took all of it."""
        took = set(generations)
        for said in statements:
            told: dict[int, Sequence[str | int]] = {
                shard: [
                    "progress",
                    generation,
                    said.topic_id,
                    said.partition,
                    said.published_until,
                    said.accounted_until,
                ]
                for shard, generation in generations.items()
            }
            answers = await self._scripts.on_shards(told)
            took -= {shard for shard, answer in answers.items() if answer != "ok"}
        return sorted(took)

    async def open(self, generation: int, shards: Iterable[int]) -> None:
        """Let the buckets of these shards decide."""
        await self._scripts.on_shards({shard: ["open", generation] for shard in shards})

    async def _everywhere(self, *words: str | int) -> dict[int, str]:
        return await self._scripts.on_shards(dict.fromkeys(range(SHARDS), words))

    # -- buckets

    async def run(self, calls: Sequence[tuple[str, Sequence[Op]]]) -> list[list[str]]:
        """Operations of clients' buckets in one round trip, each client once or more often; their answers."""
        merged: dict[str, list[Op]] = {}
        places = []
        for client_id, ops in calls:
            of_client = merged.setdefault(client_id, [])
            places.append((client_id, len(of_client), len(ops)))
            of_client.extend(ops)
        answers = await self._scripts.run_many(merged) if merged else {}
        return [answers[client_id][first : first + count] for client_id, first, count in places]

    async def lifetimes(self, client_id: str, generation: int) -> dict[tuple[str, int], tuple[int, int]]:
        """The totals a bucket knows: by topic id and source partition its cutoff and lifetime micro-credits.

        Of a bucket that isn't of this generation: none.
        """
        with _away():
            fields = _texts(await self._client.hgetall(self._keys.bucket(client_id)))
        if fields.get("gen") != str(generation):
            return {}
        totals = {}
        for name, value in fields.items():
            kind, _, source = name.partition(":")
            if kind == "c":
                topic_id, _, partition = source.rpartition(":")
                cutoff, life = value.split(" ")
                totals[topic_id, int(partition)] = (int(cutoff), int(life))
        return totals

    async def due(self, now_ms: int, limit: int) -> list[str]:
        """Clients the sweep must look at by now; at most so many of each shard, the longest due first."""
        with _away():
            async with self._client.pipeline(transaction=False) as pipeline:
                for shard in range(SHARDS):
                    pipeline.zrange(
                        self._keys.active(shard), "-inf", now_ms, byscore=True, offset=0, num=limit
                    )
                found = await pipeline.execute()
        return [_text(client_id) for of_shard in found for client_id in of_shard]

    async def take_touched(self, shards: Sequence[int], limit: int) -> dict[str, bool]:
        """Clients whose alerts must be looked at, and whether work of theirs was refused; taken off the list.

        Args:
            limit: at most so many of each shard.
        """
        if not shards:
            return {}
        with _away():
            async with self._client.pipeline(transaction=False) as pipeline:
                for shard in shards:
                    pipeline.spop(self._keys.touched(shard), limit)
                found = await pipeline.execute()
        touched: dict[str, bool] = {}
        for text in (_text(member) for of_shard in found for member in of_shard):
            kind, _, client_id = text.partition(":")
            touched[client_id] = touched.get(client_id, False) or kind == "r"
        return touched

    async def is_durable(self) -> bool:
        """Whether the server has every write on disk before it answers, and never was a replica."""
        with _away():
            try:
                config = _texts(await self._client.config_get("append*"))
                replication = _texts(await self._client.info("replication"))
            except ResponseError:
                return False  # a managed server doesn't tell
        alone = str(replication.get("master_replid2", "")).strip("0") == ""
        return (
            config.get("appendonly") == "yes"
            and config.get("appendfsync") == "always"
            and replication.get("role") == "master"
            and alone
        )


async def open_shards(settings: RedisSettings) -> Shards:
    """Connect to the server or cluster, whichever answers, and look whether it can keep credits.

    Raises:
        UserError: the address is wrong, or the server refuses us or is too old.
        RetryLater: it doesn't answer.
    """
    options: dict[str, Any] = {"socket_timeout": ANSWER_S_MAX, "socket_connect_timeout": ANSWER_S_MAX}
    try:
        single = Redis.from_url(settings.url, **options)
    except ValueError as error:
        raise UserError(f"METERLINE_REDIS__URL is no address of Redis: {error}") from None
    client: Redis | RedisCluster = single
    with _away():
        if (await single.info("cluster")).get("cluster_enabled"):
            await single.aclose()
            client = RedisCluster.from_url(settings.url, **options)
    shards = Shards(client, settings.namespace)
    await shards.prepare()
    return shards


@contextmanager
def _away() -> Iterator[None]:
    try:
        yield
    except (AuthenticationError, NoPermissionError) as error:
        raise UserError(f"Redis refuses us: {error}") from error
    except TROUBLE as error:
        raise RetryLater(f"Redis does not answer: {error or type(error).__name__}") from error


def _texts(fields: Mapping[Any, Any]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in fields.items()}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
