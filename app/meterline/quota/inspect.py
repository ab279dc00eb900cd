"""What stands in Redis, read as it is: for commands, operators and the check.

Everything of one client is read in one transaction, so that a bucket is never seen between two of its parts.
The numbers are those of the last script call: a hold past its deadline stands until the quota worker's sweep,
or the client's next call, has looked at it.

Everything here blocks; a Redis that is away is a `UserError` inside `open_redis`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import RedisClusterException, RedisError

from meterline.errors import UserError
from meterline.quota.keys import SHARDS, Keys, shard_of
from meterline.settings import RedisSettings

__all__ = [
    "Bucket",
    "BucketReader",
    "Provisional",
    "Reservation",
    "Shard",
    "Source",
    "open_redis",
]

ANSWER_S_MAX = 5.0
"""A person waits at most this long to hear that Redis is away."""
SCAN_COUNT = 1_000
"""Keys a server looks at in one step: about a millisecond of its time."""
READ_ATTEMPTS_MAX = 5
"""A new source partition may appear between two looks at a bucket; five times in a row it does not."""


class Source(NamedTuple):
    """A partition of the source topic."""

    topic_id: str
    partition: int


@dataclass(frozen=True, slots=True)
class Shard:
    """What the quota worker says of one shard of clients. Times are ms of the log.

    Attributes:
        generation: 0: the shard has no state; its buckets are closed.
        beat: grows each second while a quota worker runs.
        run_id: the server process that is believed.
    """

    number: int
    generation: int
    is_open: bool
    beat: int
    run_id: str
    partitions: int
    topic_id: str
    skew_ms: int
    accounted_until: Mapping[Source, int]
    published_until: Mapping[Source, int]

    @property
    def log_time(self) -> int | None:
        """Everything appended at or before it is accounted; None: a source partition has not said yet."""
        times = [
            self.accounted_until.get(Source(self.topic_id, number), -1) for number in range(self.partitions)
        ]
        return None if not times or min(times) < 0 else min(times)


class Provisional(NamedTuple):
    """Settled work, where it stands in the log and what it costs (micro-credits)."""

    source: Source
    offset: int
    credits_micro: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """One reservation, or a lease; amounts in micro-credits.

    Attributes:
        state: held, settled, void or expired.
        reserved_micro: what was asked for.
        hold_micro: what it still holds back.
        time: ms; of a held one its deadline, of an ended one when it is forgotten.
        seq: the number of a lease's last statement; 0: no lease.
        parts: what was settled under it. A lease keeps none.
    """

    reservation_id: str
    state: str
    reserved_micro: int
    hold_micro: int
    time: int
    seq: int
    parts: Sequence[Provisional]


@dataclass(frozen=True, slots=True)
class Bucket:
    """One client's bucket; amounts in micro-credits.

    Attributes:
        lifetime_micro: all the client ever used, as the scripts keep it; `totals` are its terms.
        provisional_micro: likewise, of `provisional`.
        held_micro: likewise, of the holds of `reservations`.
        period_start: ms; None: no period has begun.
        totals: for each source partition the cutoff and the lifetime total there.
        due: when each reservation must be looked at, ms.
        is_watched: whether the sweep of its shard knows it.
    """

    client_id: str
    shard: Shard
    granted_micro: int
    base_micro: int
    lifetime_micro: int
    provisional_micro: int
    held_micro: int
    period_start: int | None
    totals: Mapping[Source, tuple[int, int]]
    provisional: Sequence[Provisional]
    reservations: Mapping[str, Reservation]
    due: Mapping[str, int]
    is_watched: bool

    @property
    def consumed_micro(self) -> int:
        """What the log charged since the base."""
        return self.lifetime_micro - self.base_micro

    @property
    def available_micro(self) -> int:
        """What is left; negative: debt."""
        return self.granted_micro - self.consumed_micro - self.provisional_micro - self.held_micro


class BucketReader:
    """Reads the buckets of one namespace."""

    def __init__(self, redis: Redis | RedisCluster, namespace: str) -> None:
        self._redis: Any = redis  # its answers are typed for asyncio and threads at once
        self._namespace = namespace
        self._keys = Keys(namespace)
        self._run_ids = _run_ids(self._redis.info("server"))

    def is_believed(self, shard: Shard) -> bool:
        """Whether the server of the shard is still the process its state was written for.

        A server that was restarted decides nothing until the quota worker has dealt with the restart.
        """
        return not self._run_ids or shard.run_id in self._run_ids

    def shards(self) -> list[Shard]:
        """What the quota worker says, of each shard."""
        return [_shard(number, self._redis.hgetall(self._keys.state(number))) for number in range(SHARDS)]

    def client_ids(self) -> Iterator[str]:
        """Who has a bucket, of any generation; in no order, each once.

        One scan of the whole server, of which other keys are passed over: a pattern saves no work there.
        """
        seen: set[str] = set()  # a scan may name a key twice
        head = f"{self._namespace}:{{"
        for key in self._redis.scan_iter(match=_literal(head) + "*", count=SCAN_COUNT):
            shard, found, client_id = key[len(head) :].partition("}:b:")
            if found and shard.isdecimal() and client_id not in seen:
                seen.add(client_id)
                yield client_id

    def bucket(self, client_id: str) -> Bucket | None:
        """A client's bucket at one instant; None: it has none of the present generation."""
        state_key = self._keys.state(shard_of(client_id))
        bucket_key = self._keys.bucket(client_id)
        places = _places(self._redis.hget(bucket_key, "parts"))
        for _ in range(READ_ATTEMPTS_MAX):
            transaction = self._redis.pipeline(transaction=True)
            transaction.hgetall(state_key)
            transaction.hgetall(bucket_key)
            transaction.hgetall(self._keys.reservations(client_id))
            transaction.zrange(self._keys.due(client_id), 0, -1, withscores=True)
            transaction.zscore(self._keys.active(shard_of(client_id)), client_id)
            for place in places:
                key = self._keys.provisional(place.topic_id, place.partition, client_id)
                transaction.zrange(key, 0, -1)
            state, fields, records, due, watched, *provisional = transaction.execute()
            needed = _places(fields.get("parts"))
            if set(needed) <= set(places):
                break
            places = needed
        else:
            raise UserError(f"The bucket of {client_id!r} changes faster than it can be read. Try again.")
        shard = _shard(shard_of(client_id), state)
        if not fields or int(fields["gen"]) != shard.generation:
            return None
        return Bucket(
            client_id=client_id,
            shard=shard,
            granted_micro=int(fields.get("granted", 0)),
            base_micro=int(fields.get("base", 0)),
            lifetime_micro=int(fields.get("life", 0)),
            provisional_micro=int(fields.get("prov", 0)),
            held_micro=int(fields.get("held", 0)),
            period_start=int(fields["period"]) if "period" in fields else None,
            totals=_totals(fields),
            provisional=[
                Provisional(place, *(int(number) for number in member.split(":")))
                for place, members in zip(places, provisional, strict=True)
                for member in members
            ],
            reservations={rid: _reservation(rid, text) for rid, text in records.items()},
            due={rid: int(score) for rid, score in due},
            is_watched=watched is not None,
        )

    def has_grant(self, client_id: str, grant_id: str) -> bool:
        """Whether the client's bucket was told of a prepaid grant."""
        return bool(self._redis.sismember(self._keys.grants(client_id), grant_id))

    def forget_state(self, shard: Shard) -> None:
        """Order a rebuild: without its state a shard counts as lost, and the quota worker begins anew.

        Its buckets are closed at once, all others within a second. Nothing else here changes Redis.
        """
        self._redis.unlink(self._keys.state(shard.number))


@contextmanager
def open_redis(settings: RedisSettings) -> Iterator[Redis | RedisCluster]:
    """A client for one command, of a single server or of a cluster, whichever answers.

    Raises:
        UserError: Redis does not answer, or refuses us; the text says what to do. Raised for what happens
            inside the `with`, too.
    """
    address = _without_password(settings.url)
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": ANSWER_S_MAX,
        "socket_connect_timeout": ANSWER_S_MAX,
    }
    try:
        single = Redis.from_url(settings.url, **options)
    except ValueError as error:
        raise UserError(f"METERLINE_REDIS__URL {address} is no address of Redis: {error}") from None
    try:
        with single:
            if not dict(single.info("cluster")).get("cluster_enabled"):
                yield single
                return
        with RedisCluster.from_url(settings.url, **options) as cluster:
            yield cluster
    except (RedisError, RedisClusterException) as error:
        raise UserError(
            f"Redis at {address} does not answer ({error}).\n"
            "Start the local stack with `meterline up`, or point METERLINE_REDIS__URL at your server."
        ) from error


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _run_ids(info: Mapping[str, Any]) -> set[str]:
    """Of the one server, or of a cluster's nodes; empty: it tells nobody, as some managed ones."""
    nodes = [info] if "redis_version" in info else [node for node in info.values() if isinstance(node, dict)]
    return {str(node["run_id"]) for node in nodes if "run_id" in node}


def _literal(text: str) -> str:
    """The text as a pattern of SCAN that matches nothing else."""
    return "".join(f"\\{sign}" if sign in "*?[]\\^" else sign for sign in text)


def _shard(number: int, fields: Mapping[str, str]) -> Shard:
    def of(kind: str) -> dict[Source, int]:
        return {
            _source(name[len(kind) :]): int(value) for name, value in fields.items() if name.startswith(kind)
        }

    return Shard(
        number=number,
        generation=int(fields.get("gen", 0)),
        is_open=fields.get("open") == "1",
        beat=int(fields.get("beat", 0)),
        run_id=fields.get("run", ""),
        partitions=int(fields.get("partitions", 0)),
        topic_id=fields.get("topic", ""),
        skew_ms=int(fields.get("skew_ms", 0)),
        accounted_until=of("t:"),
        published_until=of("x:"),
    )


def _source(text: str) -> Source:
    topic_id, _, partition = text.rpartition(":")
    return Source(topic_id, int(partition))


def _places(text: str | None) -> list[Source]:
    return [_source(word) for word in (text or "").split()]


def _totals(fields: Mapping[str, str]) -> dict[Source, tuple[int, int]]:
    found = {}
    for name, text in fields.items():
        if name.startswith("c:"):
            cutoff, _, life = text.partition(" ")
            found[_source(name[2:])] = (int(cutoff), int(life))
    return found


def _reservation(reservation_id: str, text: str) -> Reservation:
    state, hold, reserved, time, seq, parts = text.split(" ")
    return Reservation(
        reservation_id=reservation_id,
        state=state,
        reserved_micro=int(reserved),
        hold_micro=int(hold),
        time=int(time),
        seq=int(seq),
        parts=[
            _part(part) for part in parts.split(",") if ":" in part
        ],  # without any: "-", or "+" of a lease
    )


def _part(text: str) -> Provisional:
    place, offset, credits_micro = text.rsplit(":", 2)
    return Provisional(_source(place), int(offset), int(credits_micro))
