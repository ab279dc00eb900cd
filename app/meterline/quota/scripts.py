"""The two Lua scripts as calls: what a bucket is asked (words: `domain.buckets`), what a shard is told.

    scripts = Scripts(redis.asyncio.from_url(url), namespace="meterline")     # or a RedisCluster
    await scripts.prepare()                                # optional: refuses a wrong server early
    await scripts.run_ops("client", [["r", "task/1", 5_000_000, 60_000], ["b"]])    # -> ["g ...", "..."]
    await scripts.run_many({"client": [...], "other": [...]})          # one round trip, {"client": [...]}

Shards, told by the quota app:

    begin(shard, gen, partitions=, topic_id=, skew_ms=)  "ok" new, closed generation; "o" not a newer one
    adopt(shard, gen)                                    "ok" goes on under this run; "0" other generation
    beat(shard, gen, number, partitions=, topic_id=)     "ok <previous number>"; "0"; "r" restarted since
    progress(shard, gen, topic_id, partition, published_until, accounted_until)    "ok"; "0"; "r"
    open(shard, gen)                                     "ok"; "0"; "r"
    look(shard) -> ShardState
    on_shards({shard: ["beat", gen, ...]})               many of them in one round trip, {shard: answer}

`progress` names the generation because it vouches for *these* buckets: all totals up to there were applied to
them. One that was meant for the buckets before a rebuild must not count for the new, empty ones.

Every call is idempotent. A server that is away, busy, full or restarting raises `RetryLater`: the call was or
was not done; make it again.

**Restarts.** The text of a script begins with the run id of the server it is loaded into, and is loaded over
the very connection that told the id. A restarted server has an empty script cache, so NOSCRIPT leads to the
new id and a new text. The script compares it with the id the shard's generation began under, and nobody who
holds an old text can reach the new process. This needs a server that keeps no scripts in its append-only
file: Redis 7.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from meterline.domain import buckets
from meterline.errors import RetryLater, UserError
from meterline.quota.keys import SHARDS, Keys, shard_of

__all__ = [
    "OPS_PER_CALL_MAX",
    "Scripts",
    "ShardState",
    "info_fields",
    "is_passing",
    "rendered",
    "run_id_of",
]

Op = Sequence[Any]
_Call = tuple[Sequence[str], Sequence[str | int]]
"""KEYS and ARGV of one script call."""

OPS_PER_CALL_MAX = 500
"""The server does nothing else while a script runs; so many operations take about 2 ms."""

RELOADS_MAX = 5
"""A script can be flushed between loading and calling it; a server that forgets it so often is not one."""

CALLS_AT_ONCE_MAX = 32
"""Each takes a connection of its own, of which a cluster client has 100 for a node."""

SERVER_MAJOR_MIN = 7

_LIMITS = {
    "MICRO_MAX": buckets.BUCKET_MICRO_MAX,
    "TERMINAL_KEEP_MS": buckets.TERMINAL_KEEP_MS,
    "TTL_MS_MAX": buckets.TTL_MS_MAX,
    "PARTS_MAX": buckets.PARTS_MAX,
    "SWEEP_MS": buckets.SWEEP_MS,
    "SWEEP_MAX": buckets.SWEEP_MAX,
}
TROUBLE = RedisError, RedisClusterException, OSError
"""What redis-py raises when a server, or a whole cluster, does not do what it is asked."""

_LATER = {
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
}
"""Errors a server recovers from, by itself or by its operator's hand."""


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard's state, and whether the server that holds it may be believed.

    Attributes:
        server_run: the id of the running server process.
        run: the id under which the generation began or was adopted; empty: no generation, or it was lost.
        published_until: by (topic id, partition): offset up to which every total is applied.
        accounted_until: by (topic id, partition): log time (ms) up to which everything is accounted.
    """

    server_run: str
    run: str
    generation: int
    open: bool
    beat: int
    partitions: int
    topic_id: str
    skew_ms: int
    published_until: Mapping[tuple[str, int], int]
    accounted_until: Mapping[tuple[str, int], int]

    @property
    def trusted(self) -> bool:
        """A generation exists and the server hasn't been restarted since."""
        return self.generation > 0 and self.run == self.server_run


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The names of the scripts in one server process."""

    bucket: str
    shard: str


def rendered(name: str, run_id: str) -> str:
    """A script's text for one server process. `name`: bucket or shard."""
    body = files("meterline.quota").joinpath(f"{name}.lua").read_text(encoding="utf-8")
    constants = {"RUN": f'"{run_id}"'} | {limit: str(value) for limit, value in _LIMITS.items()}
    return "".join(f"local {constant} = {value}\n" for constant, value in constants.items()) + body


def packed(ops: Sequence[Op]) -> tuple[str, str, dict[int, str]]:
    """Operations as bucket.lua takes them: source partitions, a flat JSON array; what was refused, by place.

    Flat, because a nested array costs the server as much to read as the operation costs to do. Parts are a
    count and then (number of the source, offset, credits) each.
    """
    flat: list[Any] = []
    sources: dict[str, int] = {}
    refused: dict[int, str] = {}

    def number_of(topic_id: str, partition: int) -> int:
        return sources.setdefault(f"{topic_id}:{partition}", len(sources) + 1)

    for place, op in enumerate(ops):
        if why := buckets.why_refused(op):
            refused[place] = why
            continue
        match op:
            case ["s", rid, parts, final]:
                flat += ("s", rid, int(final), len(parts))
            case ["l", rid, seq, hold, parts, ttl_ms, *generation]:
                flat += ("l", rid, seq, hold, ttl_ms, *(generation or [buckets.BUCKET_MICRO_MAX]), len(parts))
            case ["n", rid, n, ttl_ms]:
                flat += ("n", rid, n, ttl_ms, buckets.BUCKET_MICRO_MAX)
                continue
            case ["T", topic_id, partition, cutoff, life]:
                flat += ("T", number_of(topic_id, partition), cutoff, life)
                continue
            case _:
                flat += op
                continue
        for topic_id, partition, offset, credits_micro in parts:
            flat += (number_of(topic_id, partition), offset, credits_micro)
    batch = json.dumps(flat, ensure_ascii=False, separators=(",", ":"))
    return " ".join(sources), batch, refused


class Scripts:
    """The scripts on one server or cluster. The Redis client is its owner's to close."""

    def __init__(self, client: Redis | RedisCluster, *, namespace: str = "meterline") -> None:
        self.client = client
        self.keys = Keys(namespace)
        self._loaded: dict[str, _Loaded] = {}
        self._loading = asyncio.Lock()
        self._at_once = asyncio.Semaphore(CALLS_AT_ONCE_MAX)

    async def prepare(self) -> None:
        """Check the server and load the scripts.

        Raises:
            UserError: the server is too old, or refuses us.
            RetryLater: it is away.
        """
        await self._load(self.keys.state(0), None)

    # ------------------------------------------------------------------ buckets

    async def run_ops(self, client_id: str, ops: Sequence[Op]) -> list[str]:
        """Do operations of one client, in order; one answer each."""
        return (await self.run_many({client_id: ops}))[client_id]

    async def run_many(self, ops: Mapping[str, Sequence[Op]]) -> dict[str, list[str]]:
        """Do operations of many clients in one round trip.

        Each client's are done in order and, up to `OPS_PER_CALL_MAX`, at one instant.

        Raises:
            RetryLater: the server is away, or the answer didn't come. Any operation may have been done.
        """
        calls: list[_Call] = []
        refused: list[tuple[str, dict[int, str]]] = []
        for client_id, of_client in ops.items():
            keys = self.keys.of_bucket_script(client_id)
            prefix = self.keys.provisional_prefix(shard_of(client_id))
            for start in range(0, len(of_client), OPS_PER_CALL_MAX):
                sources, batch, wrong = packed(of_client[start : start + OPS_PER_CALL_MAX])
                calls.append((keys, (client_id, prefix, sources, batch)))
                refused.append((client_id, wrong))
        answers: dict[str, list[str]] = {client_id: [] for client_id in ops}
        for (client_id, wrong), reply in zip(refused, await self._evaluate("bucket", calls), strict=True):
            texts = [_text(answer) for answer in reply]
            for place, why in wrong.items():
                texts.insert(place, why)
            answers[client_id].extend(texts)
        return answers

    # ------------------------------------------------------------------ shards

    async def begin(
        self, shard: int, generation: int, *, partitions: int, topic_id: str, skew_ms: int
    ) -> str:
        """Start a new, closed generation: every bucket of an older one counts as empty."""
        return await self._on_shard(shard, "begin", generation, partitions, topic_id, skew_ms)

    async def adopt(self, shard: int, generation: int) -> str:
        """Go on after a restart that can't have lost anything."""
        return await self._on_shard(shard, "adopt", generation)

    async def beat(self, shard: int, generation: int, number: int, *, partitions: int, topic_id: str) -> str:
        """Write the heartbeat. The previous number in the answer tells whether the state went back."""
        return await self._on_shard(shard, "beat", generation, number, partitions, topic_id)

    async def progress(  # noqa: PLR0917 - the words of a progress record, in its order
        self,
        shard: int,
        generation: int,
        topic_id: str,
        partition: int,
        published_until: int,
        accounted_until: int,
    ) -> str:
        """Vouch that every total up to there was applied to this shard's buckets. Both values only grow."""
        return await self._on_shard(
            shard, "progress", generation, topic_id, partition, published_until, accounted_until
        )

    async def open(self, shard: int, generation: int) -> str:
        """Let the buckets decide again."""
        return await self._on_shard(shard, "open", generation)

    async def look(self, shard: int) -> ShardState:
        """Read the state."""
        (reply,) = await self._evaluate("shard", [([self.keys.state(shard)], ("look",))])
        return _shard_state([_text(part) for part in reply])

    async def look_at_all(self) -> list[ShardState]:
        """Read the state of every shard in one round trip, by number."""
        calls: list[_Call] = [([self.keys.state(shard)], ("look",)) for shard in range(SHARDS)]
        return [
            _shard_state([_text(part) for part in reply]) for reply in await self._evaluate("shard", calls)
        ]

    async def on_shards(self, operations: Mapping[int, Sequence[str | int]]) -> dict[int, str]:
        """Tell many shards something in one round trip: `{7: ["beat", gen, number, count, topic_id]}`."""
        calls = [([self.keys.state(shard)], arguments) for shard, arguments in operations.items()]
        replies = await self._evaluate("shard", calls)
        return dict(zip(operations, map(_text, replies), strict=True))

    async def _on_shard(self, shard: int, *arguments: str | int) -> str:
        return (await self.on_shards({shard: arguments}))[shard]

    # ------------------------------------------------------------------ calls

    async def _evaluate(self, script: str, calls: Sequence[_Call]) -> list[Any]:
        """Call a script so often, loading it where it is missing."""
        replies: list[Any] = [None] * len(calls)
        open_calls = list(range(len(calls)))
        for _ in range(RELOADS_MAX):
            missing = []
            used = {index: await self._name_of(calls[index][0][0]) for index in open_calls}
            sent = [(getattr(used[index][1], script), *calls[index]) for index in open_calls]
            for index, reply in zip(open_calls, await self._send(sent), strict=True):
                if isinstance(reply, NoScriptError):
                    missing.append(index)
                elif isinstance(reply, Exception):
                    raise _route_of(reply) from reply
                else:
                    replies[index] = reply
            if not missing:
                return replies
            for index in missing:
                await self._load(calls[index][0][0], used[index][1])
            open_calls = missing
        raise RetryLater("Redis keeps forgetting its scripts")

    async def _send(self, calls: Sequence[tuple[str, Sequence[str], Sequence[str | int]]]) -> list[Any]:
        """Replies, or what the server answered instead of one."""
        commands = [("EVALSHA", name, len(keys), *keys, *arguments) for name, keys, arguments in calls]
        if isinstance(self.client, RedisCluster) or len(commands) == 1:
            # redis-py pipelines no scripts in a cluster; side by side they take few round trips, too.
            replies = await asyncio.gather(*map(self._send_one, commands), return_exceptions=True)
        else:
            pipeline = self.client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            try:
                replies = await pipeline.execute(raise_on_error=False)
            except TROUBLE as error:
                raise _route_of(error) from error
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, TROUBLE):
                raise reply
        return list(replies)

    async def _send_one(self, command: Sequence[Any]) -> Any:
        async with self._at_once:
            return await self.client.execute_command(*command)

    # ------------------------------------------------------------------ loading

    async def _name_of(self, key: str) -> tuple[str, _Loaded]:
        node = self._node_of(key)
        if loaded := self._loaded.get(node):
            return node, loaded
        return node, await self._load(key, None)

    def _node_of(self, key: str) -> str:
        return str(_owner(self.client, key).name) if isinstance(self.client, RedisCluster) else ""

    async def _load(self, key: str, missing: _Loaded | None) -> _Loaded:
        """Load the scripts into the server that owns the key, unless somebody just did."""
        async with self._loading:
            try:
                if isinstance(self.client, RedisCluster):
                    await self.client.initialize()
                loaded = self._loaded.get(self._node_of(key))
                if loaded is None or loaded is missing:
                    loaded = await self._load_now(key)
                    self._loaded[self._node_of(key)] = loaded
            except TROUBLE as error:
                raise _route_of(error) from error
            return loaded

    async def _load_now(self, key: str) -> _Loaded:
        if isinstance(self.client, RedisCluster):
            node = _owner(self.client, key)
            connection = node.acquire_connection()
            try:
                return await _load_over(connection)
            finally:
                node.release(connection)
        connection = await self.client.connection_pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py's
        try:
            return await _load_over(connection)
        finally:
            await self.client.connection_pool.release(connection)


async def _load_over(connection: AbstractConnection) -> _Loaded:
    """Ask for the run id and load the scripts over one connection, which can't outlive the server process."""
    await connection.send_command("INFO", "server")
    info = _text(await connection.read_response())
    run_id = run_id_of(info_fields(info))
    names = []
    for script in ("bucket", "shard"):
        # Sending over a closed connection would silently open a new one, to a process with another run id.
        if not connection.is_connected:
            raise RetryLater("Redis closed the connection")
        packed = connection.pack_command("SCRIPT", "LOAD", rendered(script, run_id))
        await connection.send_packed_command(packed, check_health=False)
        names.append(_text(await connection.read_response()))
    return _Loaded(*names)


def info_fields(info: str) -> dict[str, str]:
    """What INFO says, by name."""
    return dict(line.split(":", 1) for line in info.splitlines() if ":" in line)


def run_id_of(fields: Mapping[str, str]) -> str:
    """The run id of a server on which a restart is noticed.

    Args:
        fields: INFO's section `server`.

    Raises:
        UserError: it isn't one: too old, 32-bit, or without a run id.
    """
    version = fields.get("redis_version", "0")
    if int(version.split(".")[0]) < SERVER_MAJOR_MIN:
        raise UserError(
            f"Redis {version} is too old for credit buckets: it keeps scripts over a restart, so a bucket "
            f"that lost its last second would be believed. Use Redis {SERVER_MAJOR_MIN} or later, or Valkey."
        )
    if fields.get("arch_bits") != "64":
        raise UserError("Redis must be a 64-bit build: a 32-bit one can't print a bucket's amounts exactly.")
    if not re.fullmatch(r"[0-9a-f]{40}", run_id := fields.get("run_id", "")):
        raise UserError(f"Redis tells no run id ({run_id!r}); credit buckets need it to notice a restart.")
    return run_id


def _owner(cluster: RedisCluster, key: str) -> ClusterNode:
    try:
        node = cluster.get_node_from_key(key)
    except RedisClusterException:
        node = None
    if node is None:
        raise RetryLater("no server of the Redis Cluster has the slot of the buckets")
    return node


def is_passing(error: ResponseError) -> bool:
    """Whether the server, not the operation, is the trouble: read-only, full, busy with another script."""
    # redis-py cuts the code off the text of the errors it has a class for, such as OOM.
    return (error.status_code or str(error).partition(" ")[0]) in _LATER


def _route_of(error: Exception) -> Exception:
    if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
        return UserError(f"Redis refuses us: {error}")
    if isinstance(error, ResponseError) and not is_passing(error):
        return error
    return RetryLater(f"Redis: {error}")


def _text(reply: Any) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)


def _shard_state(reply: Sequence[str]) -> ShardState:
    server_run, *pairs = reply
    fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
    return ShardState(
        server_run=server_run,
        run=fields.get("run", ""),
        generation=int(fields.get("gen", 0)),
        open=fields.get("open") == "1",
        beat=int(fields.get("beat", 0)),
        partitions=int(fields.get("partitions", 0)),
        topic_id=fields.get("topic", ""),
        skew_ms=int(fields.get("skew_ms", 0)),
        published_until=_by_source(fields.items(), "x"),
        accounted_until=_by_source(fields.items(), "t"),
    )


def _by_source(fields: Iterable[tuple[str, str]], kind: str) -> dict[tuple[str, int], int]:
    found = {}
    for name, value in fields:
        if name.startswith(f"{kind}:"):
            _, topic_id, partition = name.split(":")
            found[topic_id, int(partition)] = int(value)
    return found
