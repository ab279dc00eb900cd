"""Was every event counted once, with its credits, in its window? From the input file, raw rows, statements.

Three books are held against the input file, each by itself: rows of the ledger, the newest snapshot of each
window and source partition, the newest total of each client and source partition. Nothing of the product is
imported here, and no sum is taken from it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeVar

from tests.proof.metering_books import EVENT, POISON, Amount, Evidence, Line, Row

__all__ = ["Verdict", "credits_text", "judge"]

MICRO = 1_000_000
SHOWN_MAX = 5

Key = TypeVar("Key", bound=Hashable)
Cell = tuple[str, int, str]
"""Client, window start, SKU."""


@dataclass(slots=True)
class Verdict:
    """What was found; neither lost nor duplicated, no difference and no problem: conserved.

    Attributes:
        lost: event id -> credits, of events that aren't in the ledger.
        duplicated: event id -> credits above those of one, of events that stand there more than once.
        differences: book -> credits by which it differs from the input file, added up over its entries
            whatever their sign.
        problems: whatever else is wrong.
    """

    lost: dict[str, int] = field(default_factory=dict)
    duplicated: dict[str, int] = field(default_factory=dict)
    differences: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def credit_difference(self) -> int:
        """Of the book that differs most."""
        return max(self.differences.values(), default=0)

    @property
    def is_conserved(self) -> bool:
        return not (self.lost or self.duplicated or self.credit_difference or self.problems)

    @property
    def summary(self) -> str:
        difference = credits_text(self.credit_difference)
        return f"lost={len(self.lost)} duplicated={len(self.duplicated)} credit_difference={difference}"

    def details(self) -> Iterator[str]:
        """Which events, how many credits of which book, and the problems."""
        for what, events in (("lost", self.lost), ("duplicated", self.duplicated)):
            if events:
                yield f"{what}: {credits_text(sum(events.values()))} credits, {_some(sorted(events))}"
        for book, micro in self.differences.items():
            if micro:
                yield f"{book}: {credits_text(micro)} credits differ"
        yield from self.problems


def judge(evidence: Evidence) -> Verdict:
    """Look at everything once."""
    verdict = Verdict()
    wanted, poison = _input(evidence, verdict)
    of_rows = _judge_rows(wanted, evidence, verdict)
    cells, clients = _sums(wanted.values(), evidence.window_ms)
    _judge_book("ledger", cells, of_rows, verdict)
    _judge_book("windows", cells, _newest_windows(evidence, verdict), verdict)
    _judge_book("totals", clients, _newest_totals(evidence, verdict), verdict)
    dead = Counter(evidence.dead)
    if dead != poison:
        verdict.problems.append(f"dead letters are {dict(dead)}, the input has {dict(poison)}")
    return verdict


def credits_text(micro: int) -> str:
    """In credits, exact."""
    text = f"{Decimal(micro) / MICRO:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _input(evidence: Evidence, verdict: Verdict) -> tuple[dict[str, Line], Counter[str]]:
    """Events to be counted, by id; poison by reason."""
    wanted: dict[str, Line] = {}
    poison, lines = Counter[str](), 0
    for line in evidence.lines:
        lines += 1
        if line.kind == EVENT:
            wanted[line.event_id] = line
        elif line.kind == POISON:
            poison[line.reason] += 1
    if evidence.records != lines:
        verdict.problems.append(f"the log holds {evidence.records} records, the input has {lines} lines")
    verdict.counts = {
        "events": len(wanted),
        "copies": lines - len(wanted) - poison.total(),
        "dead": poison.total(),
        "snapshots": len(evidence.snapshots),
        "totals": len(evidence.totals),
    }
    return wanted, poison


def _judge_rows(wanted: Mapping[str, Line], evidence: Evidence, verdict: Verdict) -> dict[Cell, Amount]:
    """Each event at one offset, as it was said, each offset one event; what the rows add up to."""
    times = Counter[str]()
    of_rows: dict[Cell, Amount] = defaultdict(Amount)
    strange, altered, contradictory = [], [], []
    before: Row | None = None
    for row in evidence.rows:
        if before is not None and before[:2] == row[:2]:
            contradictory.append(row[:2])
            continue
        before = row
        line = wanted.get(row.event_id)
        if line is None:
            strange.append(row.event_id)
        elif (*line[1:8],) != (*row[2:],):
            altered.append(row.event_id)
        times[row.event_id] += 1
        if times[row.event_id] > 1:
            verdict.duplicated[row.event_id] = verdict.duplicated.get(row.event_id, 0) + row.micro
        cell = row.client_id, _start(row.occurred_at, evidence.window_ms), row.sku
        of_rows[cell] = of_rows[cell].with_event(row.micro, billable=row.billable)
    verdict.lost = {event_id: line.micro for event_id, line in wanted.items() if not times[event_id]}
    if strange:
        verdict.problems.append(f"{len(strange)} rows of events nobody published: {_some(strange)}")
    if altered:
        verdict.problems.append(f"{len(altered)} rows say something else than the input: {_some(altered)}")
    if contradictory:
        verdict.problems.append(
            f"{len(contradictory)} rows contradict another at their offset: {_some(contradictory)}"
        )
    return of_rows


def _sums(lines: object, window_ms: int) -> tuple[dict[Cell, Amount], dict[str, Amount]]:
    cells: dict[Cell, Amount] = defaultdict(Amount)
    clients: dict[str, Amount] = defaultdict(Amount)
    for line in lines:
        cell = line.client_id, _start(line.occurred_at, window_ms), line.sku
        cells[cell] = cells[cell].with_event(line.micro, billable=line.billable)
    for (client, _, _), amount in cells.items():
        clients[client] = clients[client].plus(amount)
    return cells, clients


def _newest_windows(evidence: Evidence, verdict: Verdict) -> dict[Cell, Amount]:
    """Of each window and source partition the statement with the highest cutoff; partitions added up."""
    said: dict[tuple[str, int, int, int], Mapping[str, Amount]] = {}
    newest: dict[tuple[str, int, int], int] = {}
    for snapshot in evidence.snapshots:
        window = snapshot.client_id, snapshot.start, snapshot.partition
        if said.setdefault((*window, snapshot.cutoff), snapshot.skus) != snapshot.skus:
            verdict.problems.append(f"window {window} says two things as of {snapshot.cutoff}")
        newest[window] = max(newest.get(window, -1), snapshot.cutoff)
    told: dict[Cell, Amount] = defaultdict(Amount)
    for (client, start, partition), cutoff in newest.items():
        for sku, amount in said[client, start, partition, cutoff].items():
            told[client, start, sku] = told[client, start, sku].plus(amount)
    return told


def _newest_totals(evidence: Evidence, verdict: Verdict) -> dict[str, Amount]:
    said: dict[tuple[str, int, int], Amount] = {}
    newest: dict[tuple[str, int], int] = {}
    for total in evidence.totals:
        place = total.client_id, total.partition
        if said.setdefault((*place, total.cutoff), total.amount) != total.amount:
            verdict.problems.append(f"the total {place} says two things as of {total.cutoff}")
        newest[place] = max(newest.get(place, -1), total.cutoff)
    told: dict[str, Amount] = defaultdict(Amount)
    for (client, partition), cutoff in newest.items():
        told[client] = told[client].plus(said[client, partition, cutoff])
    return told


def _judge_book(
    name: str, wanted: Mapping[Key, Amount], told: Mapping[Key, Amount], verdict: Verdict
) -> None:
    micro, counts = 0, []
    for key in wanted.keys() | told.keys():
        should, does = wanted.get(key, Amount()), told.get(key, Amount())
        micro += abs(should.micro - does.micro) + abs(should.free_micro - does.free_micro)
        if (should.count, should.free_count) != (does.count, does.free_count):
            counts.append(f"{key}: {does} instead of {should}")
    verdict.differences[name] = micro
    if counts:
        verdict.problems.append(f"{name}: {len(counts)} counts differ: {_some(sorted(counts))}")


def _start(occurred_at: int, window_ms: int) -> int:
    return occurred_at - occurred_at % window_ms


def _some(what: list[object]) -> str:
    shown = ", ".join(map(str, what[:SHOWN_MAX]))
    return shown if len(what) <= SHOWN_MAX else f"{shown} and {len(what) - SHOWN_MAX} more"
