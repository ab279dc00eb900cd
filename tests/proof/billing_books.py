"""What the proof of billing compares: statements of the input, steps of the ledger, what Stripe counted.

Amounts are micro-credits, times milliseconds since the epoch, wherever the name says nothing else.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["Counted", "Evidence", "Period", "Statement", "StatementFile", "Step", "statements_of"]


class Statement(NamedTuple):
    """What was said of a client's window, from one partition of the source.

    Attributes:
        said_at: when it was published.
        micro: billable credits of the window as of `cutoff`.
    """

    said_at: int
    client_id: str
    start: int
    partition: int
    cutoff: int
    micro: int


class Period(NamedTuple):
    """Half-open. `takes_until`: what is known by then must be on its own invoice."""

    start: int
    end: int
    takes_until: int


class Step(NamedTuple):
    """One row of billing's log."""

    kind: str
    client_id: str
    period_start: int
    window_start: int
    source_partition: int
    cutoff: int
    micro: int
    identifier: str
    value: int
    reason: str
    recorded_at: int


class Counted(NamedTuple):
    """A meter event that Stripe counted, or rejected after it had accepted it."""

    identifier: str
    customer: str
    timestamp_s: int
    received_s: int
    value: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything there is, as of now.

    Attributes:
        periods: the last one is not over.
        steps: each once, in the order of their partition's log.
        invoices: quantity by customer and start of the period, of final ones.
        customers: client -> customer.
        outage: `[start, end)`, while nobody could reach Stripe.
    """

    statements: Iterable[Statement]
    periods: Sequence[Period]
    steps: Sequence[Step]
    counted: Sequence[Counted]
    rejected: Sequence[Counted]
    invoices: Mapping[tuple[str, int], int]
    customers: Mapping[str, str]
    outage: tuple[int, int]
    unit_micro: int


class StatementFile:
    """The input: a statement is in it before it is published."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._text = path.open("w", newline="")
        self._table = csv.writer(self._text)

    def add(self, statements: Iterable[Statement]) -> None:
        self._table.writerows(statements)
        self._text.flush()


def statements_of(path: Path) -> Iterator[Statement]:
    """Every statement of an input file."""
    with path.open(newline="") as text:
        for said_at, client, start, partition, cutoff, micro in csv.reader(text):
            yield Statement(int(said_at), client, int(start), int(partition), int(cutoff), int(micro))
