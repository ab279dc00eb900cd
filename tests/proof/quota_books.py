"""What is known of one client's credits, each part from where it originates; and the tasks' own logs, read.

Nothing of the product is imported here. Amounts are micro-credits, times milliseconds since the epoch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["BucketNow", "Event", "Evidence", "Hold", "Sample", "TaskBook", "Work"]


class Event(NamedTuple):
    """A record of usage.events, as any reader sees it."""

    partition: int
    offset: int
    appended_at: int
    event_id: str
    sku: str
    micro: int
    reservation_id: str | None


class Sample(NamedTuple):
    """A bucket at one instant, while it was open.

    Attributes:
        unused: granted, less consumed and provisional. What is available may be below zero for a while and
            harm nobody: usage that is accounted before its reservation is settled counts twice until then.
    """

    at: int
    available: int
    unused: int


@dataclass(slots=True)
class Hold:
    """What a task believes to hold."""

    micro: int = 0
    until: list[tuple[int, int]] = field(default_factory=list)
    """(known since, deadline)."""
    ended_at: int | None = None
    settled: list[tuple[int, tuple[int, int], int]] = field(default_factory=list)
    """(when, position, micro)."""

    def stands(self, at: int) -> bool:
        """Whether its deadline, as known then, is not over and it was not given back before.

        The acknowledgement and the last settle may follow within the same millisecond.
        """
        deadlines = [until for since, until in self.until if since <= at]
        return bool(deadlines) and max(deadlines) >= at and (self.ended_at is None or self.ended_at >= at)


@dataclass(slots=True)
class Work:
    """A unit of work: when it was first done, and what it costs."""

    at: int
    micro: int
    reservation_id: str | None
    times: int = 1


class TaskBook:
    """The tasks' own logs, read."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self.holds: dict[str, Hold] = defaultdict(Hold)
        self.work: dict[str, Work] = {}
        self.conflicts: set[tuple[str, int]] = set()
        self.kills: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        for line in sorted(lines, key=lambda line: line["at"]):
            self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        at, do, rid = line["at"], line["do"], line.get("rid")
        if do == "ask":
            self.attempts[line["task"]] += 1
        elif do == "granted":
            self.holds[rid].micro = line["micro"]
            self.holds[rid].until.append((at, line["until"]))
        elif do == "renewed":
            self.holds[rid].until.append((at, line["until"]))
        elif do == "void":
            self.holds[rid].ended_at = at
        elif do == "settle":
            hold = self.holds[rid]
            hold.settled += [(at, (partition, offset), micro) for partition, offset, micro in line["parts"]]
            if line["final"] and hold.ended_at is None:
                hold.ended_at = at
        elif do == "work":
            known = self.work.setdefault(line["event"], Work(at, line["micro"], rid, 0))
            known.times += 1
        elif do == "conflict":
            self.conflicts.add((line["event"], line["micro"]))
        elif do == "kill":
            self.kills[line["kind"]] += 1
        elif do == "end":
            self.ends[line["how"]] += 1
        elif do == "done":
            self.done[line["how"]] += 1


class BucketNow(NamedTuple):
    """A client's bucket in Redis, and every entry that makes up its sums."""

    granted: int
    consumed: int
    provisional: int
    reserved: int
    provisional_entries: Sequence[tuple[str, int]] = ()
    """(key and member, micro)."""
    held: Mapping[str, int] = {}
    """Reservation id -> micro, of those that are neither settled nor ended."""
    lapsed_leases: Sequence[str] = ()

    @property
    def available(self) -> int:
        return self.granted - self.consumed - self.provisional - self.reserved


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known about one client, each part from where it originates."""

    tasks: TaskBook
    log: Sequence[Event]
    """usage.events, in the order of its partition."""
    granted: Sequence[tuple[int, int]]
    """credit.grants: (appended at, micro)."""
    totals: int
    """Sum of the newest usage.totals."""
    ledger: Mapping[tuple[int, int], tuple[str, int]]
    """Rows of events by position: event id, micro."""
    dead: Mapping[tuple[int, int], str]
    """Dead letters by position: reason."""
    bucket: BucketNow
    samples: Sequence[Sample] = ()
    lease_holds: Mapping[str, int] = field(default_factory=dict)
    """The most that each lease was seen to hold."""
    stalls: int = 0
    """How often a holder of leases was stopped and went on."""
