"""Twins: later copies of an accepted event that metering could not recognise, and how each is taken back.

A copy beyond the dedupe horizon, in another partition or in a topic that was made again is accepted like a
new event. Which copy stands is decided by their places in the log alone: every audit says the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from meterline.domain.encoding import hash_hex
from meterline.domain.events import Correction, CorrectionKind, UsageEvent

__all__ = ["Copy", "Verdict", "judge_copies", "twin_correction", "twin_correction_id"]

SOURCE = "meterline audit twins"


class Copy(NamedTuple):
    """One of several accepted events with one identity (client, event id). Times in ms."""

    client_id: str
    event_id: str
    appended_at: int
    topic_id: str
    partition: int
    offset: int
    payload_digest: int
    correlation_id: str
    sku: str
    credits_micro: int
    billable: bool
    occurred_at: int
    is_corrected: bool
    """An accepted correction names this very copy: a twin's, or that of a person who has looked at it."""

    @property
    def order(self) -> tuple[int, str, int, int]:
        """The first in this order stands."""
        return self.appended_at, self.topic_id, self.partition, self.offset


@dataclass(frozen=True, slots=True)
class Verdict:
    """About the copies of one event.

    Attributes:
        first: the copy that stands.
        reversed_before: twins that are taken back already.
        twins: twins that are not.
        conflicts: copies whose payload is not the first one's, and that nobody has corrected. Which is right
            is for a person to say.
    """

    first: Copy
    reversed_before: list[Copy]
    twins: list[Copy]
    conflicts: list[Copy]


def judge_copies(copies: Iterable[Copy]) -> Verdict:
    """Say of each copy of one event whether it stands. Of each payload the first is no twin."""
    ordered = sorted(copies, key=lambda copy: copy.order)
    verdict = Verdict(ordered[0], [], [], [])
    payloads: set[int] = set()
    for copy in ordered:
        if copy.payload_digest in payloads:
            (verdict.reversed_before if copy.is_corrected else verdict.twins).append(copy)
        elif payloads and not copy.is_corrected:
            verdict.conflicts.append(copy)
        payloads.add(copy.payload_digest)
    return verdict


def twin_correction_id(topic_id: str, partition: int, offset: int) -> str:
    """Event id of the correction of the copy at a place of the log: two audits publish one event.

    Returns:
        32 hexadecimal digits (golden vectors: `schemas/golden`).
    """
    return hash_hex("meterline.twin-correction.1", topic_id, partition, offset)


def twin_correction(copy: Copy) -> UsageEvent:
    """The event that takes a copy back: its credits negated, in its SKU and window."""
    return UsageEvent(
        event_id=twin_correction_id(copy.topic_id, copy.partition, copy.offset),
        client_id=copy.client_id,
        correlation_id=copy.correlation_id,
        sku=copy.sku,
        credits_micro=-copy.credits_micro,
        occurred_at=copy.occurred_at,
        source=SOURCE,
        billable=copy.billable,
        corrects=Correction(copy.event_id, CorrectionKind.TWIN, copy.topic_id, copy.partition, copy.offset),
    )
