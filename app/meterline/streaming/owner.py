"""The port between Faust made fit for money and the logic of one source partition.

A *partition owner* is created when the worker gets a partition and thrown away when it loses it. The engine
owns membership, delivery, fencing and the transaction; the owner owns what the records mean. Everything runs
on the event loop of the worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Commit", "CommitFn", "LogRange", "Output", "PartitionOwner", "SourceRecord"]


class SourceRecord(Protocol):
    """One record of the source partition, as the broker stored it."""

    offset: int
    timestamp: int
    """Append time in milliseconds (the topics use LogAppendTime)."""
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True)
class Output:
    """A record to be written by the transaction."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """What one transaction writes: all of it or nothing.

    Attributes:
        changelog: changed state, key to value; None deletes the key.
        outputs: records for other topics.
        applied_offset: every source record up to this one is accounted for by the state after this commit.
    """

    changelog: Sequence[tuple[bytes, bytes | None]]
    outputs: Sequence[Output]
    applied_offset: int


CommitFn = Callable[[Commit], Awaitable[None]]
"""Commits as the fenced owner of the partition, one commit at a time; returns when the broker has it.

If the partition was lost meanwhile the coroutine is cancelled (`asyncio.CancelledError`); any other failure
ends the process (the outcome is unknown; the restart reads the committed state)."""


@dataclass(frozen=True, slots=True)
class LogRange:
    """Where the source partition's log stands at the moment of the assignment."""

    cluster_id: str
    topic: str
    topic_id: str
    partition: int
    start_offset: int
    """Offset of the oldest record that is still there."""
    end_offset: int
    """Offset behind the last record whose fate is decided: an open transaction counts as not there yet."""


class PartitionOwner(ABC):
    """What metering and billing implement: one object per owned source partition."""

    @abstractmethod
    async def restore(self, state: Mapping[bytes, bytes], log: LogRange, commit: CommitFn) -> int:
        """Take over from the committed state, before any record is delivered.

        Called after the previous owner has been fenced. May read other systems and may commit.

        Returns:
            The offset of the first record to deliver.

        Raises:
            PartitionHalted: this partition must not go on; the others do.
        """

    @abstractmethod
    def feed(self, records: Iterable[SourceRecord]) -> None:
        """Take in records, in offset order, each exactly once. Must not block; no IO.

        Args:
            records: a list; or `BatchedRecords`, if the worker's plan says so.
        """

    @property
    @abstractmethod
    def pending(self) -> int:
        """Records taken in and not yet committed; the engine stops delivery at its limit."""

    @abstractmethod
    async def flush(self) -> None:
        """Make what is pending durable. Called every flush interval and when much is pending, never twice at
        a time; `feed` may be called while it waits.
        """  # noqa: D205 - one sentence that needs two lines

    def on_read_to_end(self) -> None:  # noqa: B027 - most owners don't care
        """Every record up to the end of the log, as the broker told it with its newest answer, has been fed.

        Called right before `flush`, again and again for as long as it is so.
        """

    def on_caught_up(self, log_time_ms: int) -> None:  # noqa: B027 - most owners don't care
        """Every record the broker appended at or before this time has been fed, by the worker's clock."""

    def on_idle(self, now_ms: int) -> None:  # noqa: B027 - most owners don't care
        """The partition is caught up and nothing arrived for a while: wall time may count as event time."""

    def close(self) -> None:  # noqa: B027 - most owners hold nothing
        """The partition is lost: stop background work; nothing may be committed any more."""
