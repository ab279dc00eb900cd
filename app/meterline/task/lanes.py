"""What the drainer keeps of everything that is on its way to Kafka."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from meterline.domain.events import UsageEvent
from meterline.producer.usage import OnOutcome
from meterline.task.segments import Position
from meterline.task.slots import Slot
from meterline.task.spool import Spool

__all__ = ["EventProducer", "Lane", "Published", "Sent", "Ticket"]


class Published(NamedTuple):
    """An event and where it stands in the log.

    Attributes:
        final: nothing more comes under its reservation.
    """

    event: UsageEvent
    final: bool
    topic_id: str
    partition: int
    offset: int


class EventProducer(Protocol):
    """What the drainer needs of a `UsageProducer` that never gives up by time."""

    def forward(self, event: UsageEvent, on_outcome: OnOutcome) -> None:
        """Queue an event; tell once what became of it."""

    def close(self, timeout_s: float = ...) -> None:
        """Give up what is still queued after so long, and stop."""


class Sent:
    """A frame whose records are on their way."""

    __slots__ = ("end", "left", "size")

    def __init__(self, end: Position, size: int, left: int) -> None:
        self.end, self.size, self.left = end, size, left


class Lane:
    """One spool: the own one, or one that was left behind (with its slot's lock)."""

    def __init__(self, spool: Spool, slot: Slot | None) -> None:
        self.spool, self.slot = spool, slot
        self.sent: deque[Sent] = deque()
        self.broken = False


class Ticket(NamedTuple):
    """One event on its way."""

    lane: Lane
    sent: Sent
    event: UsageEvent
    final: bool
