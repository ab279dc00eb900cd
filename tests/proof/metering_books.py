"""What the proof of metering compares: lines of the input file, ledger rows, statements.

Amounts are micro-credits, times milliseconds since the epoch.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

__all__ = [
    "COPY",
    "EVENT",
    "POISON",
    "Amount",
    "Evidence",
    "Line",
    "LineFile",
    "Row",
    "Snapshot",
    "Total",
    "lines_of",
]

EVENT, COPY, POISON = "event", "copy", "poison"


class Line(NamedTuple):
    """One record that was to be published.

    Attributes:
        kind: `event`: to be counted. `copy`: an earlier event again, perhaps at another time: never counted.
            `poison`: to become a dead letter.
        reason: why, of poison.
    """

    kind: str
    event_id: str
    client_id: str
    correlation_id: str
    sku: str
    micro: int
    billable: bool
    occurred_at: int
    reason: str = ""


class Row(NamedTuple):
    """One offset of the ledger."""

    partition: int
    offset: int
    event_id: str
    client_id: str
    correlation_id: str
    sku: str
    micro: int
    billable: bool
    occurred_at: int


class Amount(NamedTuple):
    """Events and credits, and those of which nobody is billed."""

    count: int = 0
    micro: int = 0
    free_count: int = 0
    free_micro: int = 0

    def plus(self, other: Amount) -> Amount:
        return Amount(*map(sum, zip(self, other, strict=True)))

    def with_event(self, micro: int, *, billable: bool) -> Amount:
        return self.plus(Amount(1, micro) if billable else Amount(0, 0, 1, micro))


class Snapshot(NamedTuple):
    """What was said of a client's window."""

    client_id: str
    start: int
    partition: int
    cutoff: int
    skus: Mapping[str, Amount]


class Total(NamedTuple):
    """What was said of all a client has used."""

    client_id: str
    partition: int
    cutoff: int
    amount: Amount


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything there is, as of now.

    Attributes:
        rows: of the ledger, as they were inserted: in the order of their offsets, equal ones once.
        statements are in the order of the log they stand in.
        dead: reason of each dead letter.
        records: how many records the source log holds.
    """

    lines: Iterable[Line]
    rows: Iterable[Row]
    snapshots: Sequence[Snapshot]
    totals: Sequence[Total]
    dead: Sequence[str]
    records: int
    window_ms: int


class LineFile:
    """The input file: a line is in it before its record is published."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        self._text: TextIO = path.open("w", newline="")
        self._table = csv.writer(self._text)

    def add(self, lines: Sequence[Line]) -> None:
        self._table.writerows((*line[:6], int(line.billable), *line[7:]) for line in lines)
        self._text.flush()
        self.lines += len(lines)

    def close(self) -> None:
        self._text.close()


def lines_of(path: Path) -> Iterator[Line]:
    """Every line of an input file."""
    with path.open(newline="") as text:
        for kind, event_id, client, task, sku, micro, billable, occurred_at, reason in csv.reader(text):
            yield Line(
                kind, event_id, client, task, sku, int(micro), billable == "1", int(occurred_at), reason
            )
