"""Was more done than granted, is anything left behind? From the tasks' own logs, Kafka, the ledger, Redis.

The bound, checked at every record of the log, in its order:

    accepted <= granted + the lapsed leases
                        + sum over accepted events of max(0, credits - hold standing for it at its append)

A hold stands until its deadline, by the tasks' own word: what they were granted, less what was appended or
settled under it before. The terms of what may be above:

    late        (1) appended after the deadline, in full
    above       (2) more than was reserved
    unreserved  (3) nothing was reserved
    leases      (4) of leases that lapsed while their holders were stopped, the most they ever held: the
                    largest of the lapsed, as many as there were stalls (a killed holder does nothing any
                    more)
    early       (5) a lost Redis that was opened too early: none, it never is
    rollover    (6) work in flight when a period begins: none, what is granted here is prepaid

Nothing of the product is imported here, and no sum is taken from it. Amounts are micro-credits, times
milliseconds since the epoch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from tests.proof.quota_books import Event, Evidence

__all__ = ["Terms", "Verdict", "credits_text", "judge", "judge_finished"]

MICRO = 1_000_000


@dataclass(slots=True)
class Terms:
    """What the bound allows above the granted credits, by its terms."""

    late: int = 0
    above: int = 0
    unreserved: int = 0
    leases: int = 0
    early: int = 0
    rollover: int = 0

    @property
    def sum(self) -> int:
        return self.late + self.above + self.unreserved + self.leases + self.early + self.rollover

    def words(self) -> dict[str, str]:
        names = ("late", "above", "unreserved", "leases", "early", "rollover")
        return {name: credits_text(getattr(self, name)) for name in names}


@dataclass(slots=True)
class Verdict:
    """What was found; no problems: conserved."""

    terms: Terms
    granted: int = 0
    accepted: int = 0
    overshoot: int = 0
    """The most by which the accepted usage was ever above what was granted."""
    work: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        amounts = {
            "granted": self.granted,
            "work": self.work,
            "accepted": self.accepted,
            "overshoot": self.overshoot,
        }
        facts = {name: credits_text(micro) for name, micro in amounts.items()} | self.terms.words()
        listed = " ".join(f"{name}={value}" for name, value in (facts | self.counts).items())
        return f"quota: {'NOT conserved' if self.problems else 'conserved'} ({listed})"


def judge(evidence: Evidence, *, terms_expected: bool = False) -> Verdict:
    """Look at everything once.

    Args:
        terms_expected: some tasks outlive their reservations, by intention; False: every term must be 0.
    """
    accepted, refused = _accepted(evidence)
    verdict = Verdict(Terms())
    verdict.granted = sum(micro for _, micro in evidence.granted)
    verdict.accepted = sum(event.micro for event in accepted)
    lapsed = sorted(evidence.lease_holds.get(lease, 0) for lease in evidence.bucket.lapsed_leases)
    verdict.terms.leases = sum(lapsed[::-1][: evidence.stalls])
    term_of = dict(_terms(accepted, evidence, verdict.terms))
    problems = verdict.problems
    problems += _above_the_bound(accepted, term_of, evidence, verdict)
    problems += _work_above_the_bound(accepted, term_of, evidence, verdict)
    problems += _lost_or_invented_work(accepted, evidence)
    problems += _wrong_sums(accepted, refused, evidence)
    problems += _left_behind(evidence)
    if not terms_expected:
        problems += _debts(evidence, verdict.terms)
    if verdict.terms.sum and not terms_expected:
        problems.append(f"every term of the bound must be 0: {verdict.terms.words()}")
    tasks = evidence.tasks
    verdict.counts = {
        "tasks": len(tasks.attempts),
        "attempts": tasks.attempts.total(),
        "events": len(accepted),
        "copies": len(evidence.log) - len(accepted) - len(refused),
        "conflicts": len(refused),
        "refused": tasks.ends["refused"],
        "voided": tasks.ends["voided"],
        "left": tasks.ends["left"],
        "samples": len(evidence.samples),
    }
    return verdict


def judge_finished(evidence: Evidence, finished: Mapping[str, int]) -> Verdict:
    """For tasks whose reservations others keep: every finished one is charged once, and all sums are right.

    Args:
        finished: micro-credits of each event of a finished task.
    """
    accepted, refused = _accepted(evidence)
    verdict = Verdict(Terms())
    verdict.granted = sum(micro for _, micro in evidence.granted)
    verdict.accepted = sum(event.micro for event in accepted)
    verdict.work = sum(unit.micro for unit in evidence.tasks.work.values())
    verdict.overshoot = max(0, verdict.accepted - verdict.granted)
    rows = Counter(event_id for event_id, _ in evidence.ledger.values())
    amounts = dict(evidence.ledger.values())
    not_once = [event_id for event_id in finished if rows[event_id] != 1]
    if not_once:
        verdict.problems.append(
            f"{len(not_once)} finished events are not in the ledger once: {_some(not_once)}"
        )
    wrong = [one for one, micro in finished.items() if rows[one] == 1 and amounts[one] != micro]
    if wrong:
        verdict.problems.append(
            f"{len(wrong)} finished events are in the ledger with other credits: {_some(wrong)}"
        )
    verdict.problems += _lost_or_invented_work(accepted, evidence)
    verdict.problems += _wrong_sums(accepted, refused, evidence)
    verdict.problems += _left_behind(evidence)
    verdict.counts = {
        "finished_events": len(finished),
        "events": len(accepted),
        "copies": len(evidence.log) - len(accepted) - len(refused),
    }
    return verdict


def credits_text(micro: int) -> str:
    """In credits, exact."""
    text = f"{Decimal(micro) / MICRO:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# -- the bound


def _accepted(evidence: Evidence) -> tuple[list[Event], list[Event]]:
    """The first copy of each event id, and the later ones that say something else."""
    first: dict[str, Event] = {}
    refused = []
    for event in evidence.log:
        known = first.setdefault(event.event_id, event)
        if (known.micro, known.sku) != (event.micro, event.sku):
            refused.append(event)
    return list(first.values()), refused


def _terms(accepted: Sequence[Event], evidence: Evidence, terms: Terms) -> Iterator[tuple[str, int]]:
    """What of each accepted event no hold covered, when it was appended."""
    appended: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)
    for event in accepted:
        rid = event.reservation_id
        hold = evidence.tasks.holds.get(rid) if rid is not None else None
        if hold is None or not hold.until:
            terms.unreserved += event.micro
            yield event.event_id, event.micro
            continue
        used = appended[rid]
        before = used | {place: micro for at, place, micro in hold.settled if at < event.appended_at}
        place = (event.partition, event.offset)
        before.pop(place, None)
        used[place] = event.micro
        if not hold.stands(event.appended_at):
            terms.late += event.micro
            yield event.event_id, event.micro
            continue
        uncovered = max(0, event.micro - max(0, hold.micro - sum(before.values())))
        terms.above += uncovered
        yield event.event_id, uncovered


def _granted_at(evidence: Evidence, at: int) -> int:
    return sum(micro for when, micro in evidence.granted if when <= at)


def _above_the_bound(
    accepted: Sequence[Event], term_of: Mapping[str, int], evidence: Evidence, verdict: Verdict
) -> Iterator[str]:
    allowed, so_far, worst, where = verdict.terms.leases, 0, 0, None
    for event in accepted:
        so_far += event.micro
        allowed += term_of[event.event_id]
        above = so_far - _granted_at(evidence, event.appended_at)
        verdict.overshoot = max(verdict.overshoot, above)
        if above - allowed > worst:
            worst, where = above - allowed, event
    if where is not None:
        yield (
            f"oversold by {credits_text(worst)} credits: at offset {where.offset} of partition "
            f"{where.partition} so much more was accepted than granted and allowed by the terms"
        )


def _work_above_the_bound(
    accepted: Sequence[Event], term_of: Mapping[str, int], evidence: Evidence, verdict: Verdict
) -> Iterator[str]:
    """The same, counted by the tasks, at the moment the work was done: before anybody else knew of it."""
    micro_of = {event.event_id: event.micro for event in accepted}
    allowed, so_far, worst, when = verdict.terms.leases, 0, 0, 0
    for event_id, work in sorted(evidence.tasks.work.items(), key=lambda item: item[1].at):
        micro = micro_of.get(event_id, work.micro)
        so_far += micro
        allowed += term_of.get(event_id, 0)
        above = so_far - _granted_at(evidence, work.at) - allowed
        if above > worst:
            worst, when = above, work.at
    verdict.work = so_far
    if worst:
        yield f"{credits_text(worst)} credits of work were done above the bound, first at its worst at {when}"


# -- what must be equal


def _lost_or_invented_work(accepted: Sequence[Event], evidence: Evidence) -> Iterator[str]:
    work = evidence.tasks.work
    micro_of = {event.event_id: event.micro for event in accepted}
    lost = {event_id: unit for event_id, unit in work.items() if event_id not in micro_of}
    if lost:
        amount = credits_text(sum(unit.micro for unit in lost.values()))
        yield f"{len(lost)} units of work, {amount} credits, never reached the log: {_some(lost)}"
    invented = micro_of.keys() - work.keys()
    if invented:
        amount = credits_text(sum(micro_of[event_id] for event_id in invented))
        yield f"the log has {len(invented)} events, {amount} credits, that nobody did: {_some(invented)}"
    other = [one for one in micro_of.keys() & work.keys() if micro_of[one] != work[one].micro]
    if other:
        yield f"{len(other)} events cost something else than the work: {_some(other)}"


def _wrong_sums(accepted: Sequence[Event], refused: Sequence[Event], evidence: Evidence) -> Iterator[str]:
    rows = {(event.partition, event.offset): (event.event_id, event.micro) for event in accepted}
    if rows != evidence.ledger:
        missing, too_many = rows.items() - evidence.ledger.items(), evidence.ledger.items() - rows.items()
        yield f"the ledger lacks {len(missing)} accepted events and has {len(too_many)} others"
    letters = {(event.partition, event.offset): "conflict" for event in refused}
    if letters != evidence.dead:
        yield f"dead letters are {Counter(evidence.dead.values())}, expected {len(letters)} conflicts"
    consumed = sum(micro for _, micro in rows.values())
    ledger = sum(micro for _, micro in evidence.ledger.values())
    granted = sum(micro for _, micro in evidence.granted)
    for what, found, expected in (
        ("usage.totals say", evidence.totals, consumed),
        ("the ledger sums up to", ledger, consumed),
        ("the bucket says consumed", evidence.bucket.consumed, ledger),
        ("the bucket says granted", evidence.bucket.granted, granted),
    ):
        if found != expected:
            by, way = credits_text(abs(found - expected)), "much" if found > expected else "little"
            yield f"{what} {credits_text(found)}, expected {credits_text(expected)}: {by} credits too {way}"


def _left_behind(evidence: Evidence) -> Iterator[str]:
    """Nothing is provisional or reserved when everything is over: credits that nobody could use again."""
    bucket = evidence.bucket
    listed = [key for key, _ in bucket.provisional_entries]
    if bucket.provisional or bucket.provisional_entries:
        yield (
            f"leak: {credits_text(bucket.provisional)} credits are still provisional, "
            f"{len(listed)} entries: {_some(listed)}"
        )
    if bucket.reserved or bucket.held:
        yield (
            f"leak: {credits_text(bucket.reserved)} credits are still reserved, "
            f"{len(bucket.held)} reservations: {_some(bucket.held)}"
        )
    entries = sum(micro for _, micro in bucket.provisional_entries)
    for what, told, summed in (
        ("provisional", bucket.provisional, entries),
        ("reserved", bucket.reserved, sum(bucket.held.values())),
    ):
        if told != summed:
            yield (
                f"leak: the bucket says {credits_text(told)} {what}, "
                f"its entries sum up to {credits_text(summed)}, "
                f"{credits_text(abs(told - summed))} credits differ"
            )


def _debts(evidence: Evidence, terms: Terms) -> Iterator[str]:
    """What is used or settled is never more than was granted: only the terms are above."""
    low = min(evidence.samples, key=lambda sample: sample.unused, default=None)
    if low is not None and -low.unused > terms.sum:
        yield (
            f"at {low.at} the bucket had {credits_text(-low.unused)} credits consumed and provisional above "
            f"what was granted, the terms of the bound explain {credits_text(terms.sum)}"
        )


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
