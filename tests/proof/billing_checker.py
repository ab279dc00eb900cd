"""Judges billing from the input, the ledger's raw steps and Stripe's own books; shares no code with either.

The rules it holds them to, for each client and billing period, in micro-credits:

    own      = newest statements of the period's windows; none of them may be held in the end
    invoice * unit + carried out + moved out - carried in - moved in = own
    moved    = what was said when the period's invoice took no usage any more, exactly that
    invoice  = whole units of (own - moved out + moved in + carried in), less what could not be told while
               Stripe was away

The last line is about each period's own invoice: that the sum over periods is right is not enough.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.proof.billing_books import Counted, Evidence, Period, Statement, Step

__all__ = ["Verdict", "credits_text", "judge"]

DETAILS_MAX = 20
BEFORE_OUTAGE_MS = 3 * 3_600_000
"""A record made so shortly before Stripe went away may have been in its back-off."""


def credits_text(micro: int) -> str:
    """Micro-credits as people read them."""
    whole, rest = divmod(abs(micro), 1_000_000)
    return f"{'-' if micro < 0 else ''}{whole:,}.{rest:06}"


@dataclass(slots=True)
class Verdict:
    """What was found.

    Attributes:
        lost_windows: micro-credits that were said and that no account absorbed, by client and window.
        lost: usage records that were written down, never counted by Stripe and never settled.
        doubled: identifiers that Stripe counted more than once, and the units too many.
        differences: of the identity, by client and start of the period.
        invoices: periods whose own invoice is not what the rules allow.
    """

    lost_windows: dict[tuple[str, int], int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    doubled: dict[str, int] = field(default_factory=dict)
    differences: dict[tuple[str, int], int] = field(default_factory=dict)
    invoices: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def is_conserved(self) -> bool:
        return not (self.lost_windows or self.lost or self.doubled or self.differences or self.invoices)

    @property
    def summary(self) -> str:
        difference = sum(map(abs, self.differences.values()))
        return (
            f"identifiers lost={len(self.lost)} counted_twice={len(self.doubled)} "
            f"windows_lost={len(self.lost_windows)} credit_difference={credits_text(difference)} "
            f"own_invoices_wrong={len(self.invoices)}"
        )

    def details(self) -> list[str]:
        """The first of each."""
        told = [f"{credits_text(m)} credits not absorbed: {where}" for where, m in self.lost_windows.items()]
        told += [f"lost: {name}, {value} units" for name, value in self.lost.items()]
        told += [f"counted twice: {name}, {value} units too many" for name, value in self.doubled.items()]
        told += [f"{where} differs by {credits_text(m)} credits" for where, m in self.differences.items()]
        told += self.invoices
        return told[:DETAILS_MAX]


def judge(evidence: Evidence) -> Verdict:
    """Look at everything once."""
    return _Judge(evidence).verdict()


class _Judge:
    def __init__(self, evidence: Evidence) -> None:
        self._e = evidence
        self._found = Verdict()
        self._unit = evidence.unit_micro
        self._advances = [step for step in evidence.steps if step.kind == "advance"]
        self._closes = {(s.client_id, s.period_start): s for s in evidence.steps if s.kind == "close"}
        self._told = Counter[tuple[str, int]]()
        """Units that Stripe counted, by customer and period."""
        self._names = {one.identifier for one in evidence.counted}
        self._of_client = defaultdict[str, list[Step]](list)
        for step in evidence.steps:
            self._of_client[step.client_id].append(step)
        for one in evidence.counted:
            self._told[one.customer, self._period_at(one.timestamp_s * 1000).start] += one.value

    def verdict(self) -> Verdict:
        statements = sorted(self._e.statements, key=lambda one: (one.said_at, one.cutoff))
        own, moved_out, moved_in = self._by_the_input(statements)
        self._identifiers()
        carried_in = Counter[str]()
        for period in self._e.periods[:-1]:
            for client, customer in self._e.customers.items():
                where = client, period.start
                invoice = self._e.invoices.get((customer, period.start))
                if invoice is None:
                    self._found.invoices.append(f"{where}: no final invoice")
                    continue
                absorbed = own[where] - moved_out[where] + moved_in[where] + carried_in[client]
                self._judge_invoice(client, period, invoice, absorbed)
                self._judge_identity(client, period, invoice, own[where])
                carried_in[client] = absorbed - invoice * self._unit
        self._judge_open(own, moved_in, carried_in)
        self._found.counts.update(
            statements=len(statements),
            windows=len({(s.client_id, s.start, s.partition) for s in statements}),
            usage_records=sum(step.kind == "record" for step in self._e.steps),
            attempts=sum(step.kind == "attempt" for step in self._e.steps),
            counted_by_stripe=len(self._e.counted),
            rejected_afterwards=len(self._e.rejected),
            reissued=self._reissued(),
            moved=sum(step.reason == "moved" for step in self._advances),
            closed=len(self._closes),
        )
        return self._found

    # -- what the input says must be

    def _by_the_input(
        self, statements: list[Statement]
    ) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]], Counter[tuple[str, int]]]:
        """Micro-credits by client and period: of its own windows, moved out of it, moved into it."""
        own, out, into = (Counter[tuple[str, int]]() for _ in range(3))
        newest = dict[tuple[str, int, int], Statement]()
        for said in statements:
            window = said.client_id, said.start, said.partition
            change = said.micro - (newest[window].micro if window in newest else 0)
            newest[window] = said
            period = self._period_at(said.start)
            own[said.client_id, period.start] += change
            if said.said_at > period.takes_until:
                out[said.client_id, period.start] += change
                into[said.client_id, self._period_at(said.said_at).start] += change
        self._windows(newest)
        return own, out, into

    def _windows(self, newest: dict[tuple[str, int, int], Statement]) -> None:
        """What accounts absorbed of each window is what was said of it last."""
        absorbed = Counter[tuple[str, int, int]]()
        for step in self._advances:
            if step.reason != "carry":
                absorbed[step.client_id, step.window_start, step.source_partition] += step.micro
        for window in newest.keys() | absorbed.keys():
            said = newest[window].micro if window in newest else 0
            if missing := said - absorbed[window]:
                self._found.lost_windows[window[:2]] = missing

    # -- identifiers

    def _identifiers(self) -> None:
        times = defaultdict[str, list[Counted]](list)
        for one in self._e.counted:
            times[one.identifier].append(one)
        for name, found in times.items():
            if len(found) > 1:
                self._found.doubled[name] = sum(one.value for one in found[1:])
        ended = {step.identifier for step in self._e.steps if step.kind == "settled"}
        ended |= times.keys() | {one.identifier for one in self._e.rejected}
        written = {step.identifier: step.value for step in self._e.steps if step.kind == "record"}
        self._found.lost = {name: value for name, value in written.items() if name not in ended}
        for name in times.keys() - written.keys():
            self._found.invoices.append(f"{name} was counted and never written down")

    def _reissued(self) -> int:
        """Records that no advance made."""
        advanced = {step.identifier for step in self._advances if step.identifier}
        return sum(step.kind == "record" and step.identifier not in advanced for step in self._e.steps)

    # -- each period

    def _judge_invoice(self, client: str, period: Period, invoice: int, absorbed: int) -> None:
        """What was absorbed in time is charged in whole units, but for what Stripe could not be told."""
        excused = sum(self._excused(client, period))
        wanted = max(0, max(0, absorbed // self._unit) - excused)
        if invoice != wanted:
            self._found.invoices.append(
                f"{client}, {period.start}: the invoice charges {invoice}, of {credits_text(absorbed)} "
                f"credits absorbed and {excused} units that could not be told"
            )

    def _excused(self, client: str, period: Period) -> Iterator[int]:
        """Units of records that the outage kept from Stripe until the invoice was final."""
        start, end = self._e.outage
        if not start <= period.end < end:
            return
        for step in self._of_client[client]:
            of_period = step.kind == "record" and step.period_start == period.start
            is_told = step.identifier in self._names
            if of_period and not is_told and step.recorded_at >= start - BEFORE_OUTAGE_MS:
                yield step.value

    def _judge_identity(self, client: str, period: Period, invoice: int, own: int) -> None:
        where = client, period.start
        carried_in = moved_in = moved_out = 0
        for step in self._advances_of(client):
            of_period = step.period_start == period.start
            if step.reason == "carry":
                carried_in += step.micro if of_period else 0
            elif of_period and not self._is_in(period, step):
                moved_in += step.micro
            elif not of_period and self._is_in(period, step):
                moved_out += step.micro
        close = self._closes.get(where)
        if close is None and any(step.period_start == period.start for step in self._advances_of(client)):
            self._found.invoices.append(f"{where}: never closed")
        carried_out = -close.micro if close else 0
        stands = invoice * self._unit + carried_out + moved_out - carried_in - moved_in
        if stands != own:
            self._found.differences[where] = stands - own

    def _judge_open(
        self, own: Counter[tuple[str, int]], moved_in: Counter[tuple[str, int]], carried_in: Counter[str]
    ) -> None:
        """The period that is not over: every whole unit was told, and no other."""
        period = self._e.periods[-1]
        for client, customer in self._e.customers.items():
            where = client, period.start
            absorbed = own[where] + moved_in[where] + carried_in[client]
            rows = sum(s.micro for s in self._advances_of(client) if s.period_start == period.start)
            told = self._told[customer, period.start]
            if difference := rows - absorbed + (told - max(0, rows // self._unit)) * self._unit:
                self._found.differences[where] = difference

    # -- the rest

    def _advances_of(self, client: str) -> list[Step]:
        return [step for step in self._of_client[client] if step.kind == "advance"]

    def _period_at(self, moment: int) -> Period:
        return next(period for period in self._e.periods if period.start <= moment < period.end)

    @staticmethod
    def _is_in(period: Period, step: Step) -> bool:
        return period.start <= step.window_start < period.end
