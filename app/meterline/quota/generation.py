"""Is what Redis holds still ours? Generations of the credit buckets: when one ends, and when the next opens.

A generation is everything the buckets were told since they were last empty. It ends when Redis may have
forgotten something: a shard without state or of another generation, another server process, a heartbeat below
one that was acknowledged. Nobody's word is taken for it: the run id is the server's own, the heartbeat's
number stands in Kafka. Pure: states in, verdict out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from meterline.errors import PartitionHalted
from meterline.quota.scripts import ShardState

__all__ = ["FORMAT_VERSION", "Generation", "Verdict", "judge", "log_clock", "may_open"]

FORMAT_VERSION = 1
"""Raised with every change of the record in the changelog; a newer one than ours is not read."""

NOTHING_YET = 0
"""Generation of a quota app that never ran."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What is known of the generation, durable in the changelog of partition 0.

    Attributes:
        number: 0 before the first.
        beat: the last heartbeat every shard acknowledged.
        closed_at: when it began, closed; milliseconds of the worker's clock.
        after_open: an earlier one was open: holds may be out that only the log's clock ends.
        opened: this one is, or is about to be.
        durable: Redis had every write on disk before it answered (appendfsync always), when it began.
    """

    number: int = NOTHING_YET
    beat: int = 0
    closed_at: int = 0
    after_open: bool = False
    opened: bool = False
    durable: bool = False
    format_version: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """As it stands in the changelog."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes | None) -> Generation:
        """Read it back; None: the app never ran.

        Raises:
            PartitionHalted: a newer version of Meterline wrote it.
        """
        if data is None:
            return cls()
        record = json.loads(data)
        if record["format_version"] > FORMAT_VERSION:
            raise PartitionHalted(
                f"the state of quota has format {record['format_version']}, this version of Meterline reads "
                f"{FORMAT_VERSION}, and changes nothing. Run the newer version here, too"
            )
        return cls(**record)

    def next(self, states: Sequence[ShardState], now_ms: int, *, durable: bool) -> Generation:
        """The generation after this one: above every number that may stand somewhere."""
        known = max([self.number, *(state.generation for state in states)])
        return replace(
            self,
            number=max(known + 1, now_ms),
            beat=0,
            closed_at=now_ms,
            # A generation that we don't remember was as good as any: its holds may be out.
            after_open=self.after_open or self.opened or any(state.generation for state in states),
            opened=False,
            durable=durable,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What has to happen.

    Attributes:
        lost: why the buckets can't be believed any more; empty: they can.
        restarted: nothing is missing, but these shards must be told the server's new run id.
    """

    lost: str = ""
    restarted: tuple[int, ...] = ()


def judge(known: Generation, states: Sequence[ShardState], *, durable: bool) -> Verdict:
    """Compare what Redis holds with what is known.

    Args:
        states: of every shard.
        durable: Redis has every write on disk before it answers, now as when the generation began.
    """
    if known.number == NOTHING_YET:
        return Verdict("there was no generation yet")
    restarted = []
    for number, state in enumerate(states):
        if state.generation != known.number:
            return Verdict(f"shard {number} is of generation {state.generation}, not of {known.number}")
        if state.beat < known.beat:
            return Verdict(f"shard {number} went back to heartbeat {state.beat} from {known.beat}")
        if not state.trusted:
            restarted.append(number)
    if restarted and not (durable and known.durable):
        return Verdict(f"Redis was restarted and may have lost its last second (shard {restarted[0]})")
    return Verdict(restarted=tuple(restarted))


def log_clock(state: ShardState) -> int | None:
    """Up to which time every source partition is accounted in this shard; None: not all were heard of."""
    times = [state.accounted_until.get((state.topic_id, p)) for p in range(state.partitions)]
    heard = [time for time in times if time is not None]
    return min(heard) if heard and len(heard) == len(times) else None


def may_open(state: ShardState, known: Generation, ttl_max_ms: int, skew_ms: int) -> bool:
    """Whether a closed shard may decide again, once all grants are applied.

    Each partition's time in the state says that all its totals are applied. If an earlier generation was
    open, its holds are forgotten: the log must have passed the deadline of the last of them.
    """
    clock = log_clock(state)
    if clock is None:
        return False
    return not known.after_open or clock >= known.closed_at + ttl_max_ms + skew_ms
