"""The Redis keys of credit buckets: which shard a client is in, and what each key holds.

All keys of a shard carry its hash tag, so they share one slot of a Redis Cluster: one script sees a client's
bucket, the generation and the progress of the log together, at one instant.

    <ns>:{07}:state             hash  run, gen, open, beat, partitions, topic, skew_ms,
                                      x:<topic>:<p> published until, t:<topic>:<p> accounted until
    <ns>:{07}:active            zset  client -> ms at which the sweep must look at it
    <ns>:{07}:touched           set   whose alerts to look at: t:<client> a total came, r:<client> refused
    <ns>:{07}:b:<client>        hash  gen, granted, base, life, prov, held, period, parts = sources with
                                      provisional entries, c:<topic>:<p> = "cutoff life", al:<level>:<epoch>
    <ns>:{07}:r:<client>        hash  reservation id -> "state hold reserved time seq parts"
    <ns>:{07}:d:<client>        zset  reservation id -> ms: a hold's deadline; when an ended one is forgotten
    <ns>:{07}:g:<client>        set   grant ids applied
    <ns>:{07}:p:<topic>:<p>:<client>  zset  provisional: "offset:credits" by offset
"""

from __future__ import annotations

from zlib import crc32

__all__ = ["SHARDS", "Keys", "shard_of"]

SHARDS = 64
"""Part of every key: changing it moves clients to other keys, so it needs a rebuild. 64 spread over any
cluster worth having, and one heartbeat for each stays cheap."""


def shard_of(client_id: str) -> int:
    """The shard of a client, 0 to 63."""
    return crc32(client_id.encode()) % SHARDS


class Keys:
    """The keys of one namespace (`settings.redis.namespace`)."""

    def __init__(self, namespace: str = "meterline") -> None:
        self.namespace = namespace
        self._prefixes = [f"{namespace}:{{{shard:02}}}:" for shard in range(SHARDS)]

    def state(self, shard: int) -> str:
        """Generation, restart detection, progress of the log."""
        return self._prefixes[shard] + "state"

    def active(self, shard: int) -> str:
        """When the sweep must look at which client."""
        return self._prefixes[shard] + "active"

    def touched(self, shard: int) -> str:
        """Whose alerts to look at."""
        return self._prefixes[shard] + "touched"

    def bucket(self, client_id: str) -> str:
        """A client's amounts."""
        return f"{self._prefixes[shard_of(client_id)]}b:{client_id}"

    def reservations(self, client_id: str) -> str:
        """A client's reservations."""
        return f"{self._prefixes[shard_of(client_id)]}r:{client_id}"

    def due(self, client_id: str) -> str:
        """When each reservation ends or is forgotten."""
        return f"{self._prefixes[shard_of(client_id)]}d:{client_id}"

    def grants(self, client_id: str) -> str:
        """Grants already counted."""
        return f"{self._prefixes[shard_of(client_id)]}g:{client_id}"

    def provisional(self, topic_id: str, partition: int, client_id: str) -> str:
        """Settled work that no total covers yet."""
        return f"{self.provisional_prefix(shard_of(client_id))}{topic_id}:{partition}:{client_id}"

    def provisional_prefix(self, shard: int) -> str:
        """What the keys of provisional entries begin with; the script adds the rest."""
        return self._prefixes[shard] + "p:"

    def of_bucket_script(self, client_id: str) -> list[str]:
        """KEYS of bucket.lua, in its order."""
        prefix = self._prefixes[shard_of(client_id)]
        shared = [prefix + name for name in ("state", "active", "touched")]
        return shared + [f"{prefix}{kind}:{client_id}" for kind in "brdg"]
