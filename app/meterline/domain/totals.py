"""What each client has ever used, and how far the accounting of a partition has come: true for ever."""

from __future__ import annotations

from dataclasses import dataclass

from meterline.domain.windows import SkuTotal

__all__ = ["UsageProgress", "UsageTotal"]


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """A client's lifetime usage from one source partition: every record up to the cutoff, none after it."""

    topic_id: str
    partition: int
    client_id: str
    cutoff_offset: int
    sums: SkuTotal
    """Over all SKUs."""


@dataclass(frozen=True, slots=True)
class UsageProgress:
    """How far a source partition is accounted. Both values only grow.

    Attributes:
        accounted_until: log time (ms): everything the broker appended at or before it is accounted.
        published_until: offset: up to it every total that changed is published; -1: nothing yet.
    """

    topic_id: str
    partition: int
    accounted_until: int
    published_until: int
