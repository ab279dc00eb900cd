"""`make prove-billing`: a quarter in minutes, through two billing workers that are killed a hundred times.

Real Kafka, ClickHouse's engine, the Stripe sandbox over HTTP, whose clock is the workers' time too. Windows,
late snapshots, corrections and repetitions of 500 clients; Stripe breaks off, forgets, refuses, rejects
afterwards, and is away for 30 hours across the end of a period. Then an independent checker
(`billing_checker.py`) holds the input, the ledger's raw steps, Stripe's journal and each period's own invoice
against each other. At last it must find what is planted: a window nobody published, and a usage record that
Stripe counted twice.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from tests.proof.billing_books import Evidence, Period, Statement, statements_of
from tests.proof.billing_checker import Verdict, credits_text, judge
from tests.proof.billing_evidence import (
    Journal,
    absorbed_up_to,
    final_invoices,
    steps,
    unclosed,
    written_down,
)
from tests.proof.billing_input import DAY_MS, HOUR_MS, Publisher, Quarter, client_ids
from tests.proof.billing_stripe import Stripe, periods_from
from tests.proof.pipeline import places_of
from tests.proof.virtual_time import ClockedWorker, Mover
from tests.proof.worker_kills import ANYWHERE, TAKE_OVER, Campaign, plan_kills, steps_of
from tests.sandbox_account import SandboxClient
from tests.stacks import RunningStack, running_stack
from tests.worker_processes import ended_in_the_end, kept_running

from meterline import billing
from meterline.domain.clients import PeriodUnit

WORKER_SETTINGS = {
    "METERLINE_WORKER__SESSION_TIMEOUT_MS": "6000",
    "METERLINE_BILLING__REQUESTS_PER_SECOND": "200",
}
UNIT_MICRO = 1_000_000
MINUTE_MS = 60_000
OUTAGE_H, OUTAGE_BEFORE_H = 30, 20
"""Stripe is away so long, and begins so long before the end of the second period."""
AFTERWARDS_H = 80
"""Longer than corrections come late."""
HOUR_S_MIN = 0.05
"""Time for a flush to begin; what it sends is waited for."""
HOUR_S_MAX = 1.0
KILLS_SHARE = 0.85
"""Of the quarter, in which the kills should be done: the last ones wait for work, too."""
LATER_TIMES = (2, 10)
"""At which arrival at a step that is reached again and again a worker dies: windows come by the hour."""
TOLD_S_MAX = 120.0
CAREFUL_H = 50
"""Before the end of a period, without the outage: as in reality, a dead worker is away for minutes and not
for days, so that what went wrong before is compared and made anew while the invoice takes it."""
HOUR_TOLD_S_MAX = 10.0
QUIET_S = 6.0
"""Longer than a request may be after the commit of its attempt: none is on its way any more."""
PLANTS = ("loss", "double")


def prove(
    *,
    clients: Annotated[int, typer.Option(min=2, help="How many.")] = 500,
    windows: Annotated[int, typer.Option(min=3, help="Of each client, at random hours.")] = 24,
    kills: Annotated[int, typer.Option(min=16, help="SIGKILLs of workers.")] = 110,
    period: Annotated[PeriodUnit, typer.Option(help="Of billing; three of them pass.")] = PeriodUnit.MONTH,
    seed: Annotated[int, typer.Option(help="Of the input, the faults and the kills.")] = 1,
    minutes: Annotated[float, typer.Option(help="After these nobody is killed any more, which fails.")] = 20,
) -> None:
    """Exit code 0: every identity holds, every own invoice is right. 1: otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything started is stopped, as on Ctrl-C
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="meterline-proof-"))
    with running_stack("local") as stack:
        run = Run(stack, folder, seed)
        problems = run.live_through_it(clients, windows, period, kills, began + minutes * 60)
    if problems:
        typer.echo(f"the workers' logs and the input are in {folder}")
    else:
        shutil.rmtree(folder)
    typer.echo(f"billing: {'wrong' if problems else 'proved'} ({time.monotonic() - began:.0f} s)")
    raise typer.Exit(1 if problems else 0)


class Run:
    """One stack, two workers, one quarter."""

    def __init__(self, stack: RunningStack, folder: Path, seed: int) -> None:
        self._stack, self._folder, self._seed = stack, folder, seed
        self._places = places_of(stack)
        page = folder / "clock"
        environment = stack.process_environment() | WORKER_SETTINGS
        self._workers = [ClockedWorker(environment, folder, page, slot) for slot in (0, 1)]
        sandbox = SandboxClient(stack.settings.stripe.sandbox_url)
        self._time = Mover(sandbox, page, self._workers)
        self._stripe = Stripe(sandbox, seed)
        self._journal = Journal(stack.local.state_dir / "stripe" / "journal.jsonl")
        self._publisher = Publisher(stack.settings, folder / "input.csv", seed)
        self._problems: list[str] = []

    def live_through_it(
        self, clients: int, windows: int, unit: PeriodUnit, kills: int, deadline: float
    ) -> list[str]:
        """The whole run; what is wrong."""
        self._periods = periods_from(datetime.now(UTC), unit)
        self._time.move_to(self._periods[0].start)
        names = client_ids(clients)
        self._customers = self._stripe.subscribe(names, unit, self._stack.settings)
        hours = range(self._periods[0].start, self._periods[-1].start, HOUR_MS)
        quarter = Quarter(names, hours, windows, self._seed)
        ends = self._periods[1].end
        self._outage = ends - OUTAGE_BEFORE_H * HOUR_MS, ends + (OUTAGE_H - OUTAGE_BEFORE_H) * HOUR_MS
        plan = plan_kills(kills, self._seed, steps_of(billing), LATER_TIMES)
        campaign = Campaign(self._stack, self._workers, plan, (), deadline, typer.echo)
        with ExitStack() as running:
            running.enter_context(ended_in_the_end(*self._workers))
            with ThreadPoolExecutor(1) as thread:
                killing = thread.submit(campaign.run)
                try:
                    self._pass(quarter, campaign.seconds_left)
                except BaseException:  # Ctrl-C, too: what runs is broken off
                    campaign.break_off()
                    raise
                killing.result()
            ended = running.enter_context(kept_running(*self._workers))
            self._come_to_rest()
            verdict = self._verdict()
        self._tell(campaign, campaign.ended + ended, verdict)
        problems = [*self._problems, *campaign.problems]
        for problem in problems:
            typer.echo(f"  PROBLEM {problem}")
        problems += [] if verdict.is_conserved else [verdict.summary]
        return problems or self._plant_and_find(names)

    # -- time passes

    def _pass(self, quarter: Quarter, seconds_left: Callable[[], float]) -> None:
        """Hour by hour. An hour lasts as long as the kills want, so that there is work for each of them."""
        begin, over = self._periods[0].start, self._periods[-1].start
        kills_over = begin + int((over - begin) * KILLS_SHARE)
        ends = {period.end: period for period in self._periods[:-1]}
        for hour in range(begin + HOUR_MS, over + AFTERWARDS_H * HOUR_MS, HOUR_MS):
            self._time.move_to(hour)
            if (day := hour // DAY_MS) in quarter.rows:
                self._publisher.insert_rows(quarter.rows.pop(day))
            self._publisher.publish(quarter.statements.pop(hour, ()))
            self._stripe.as_scripted(hour, self._periods, self._outage)
            hours_left = max(1, (kills_over - hour) / HOUR_MS)
            time.sleep(max(HOUR_S_MIN, min(HOUR_S_MAX, seconds_left() / hours_left)))
            if hour in ends:
                self._end_period(ends[hour])
            elif any(end - CAREFUL_H * HOUR_MS <= hour < end for end in ends) and not self._is_away(hour):
                self._until_told(hour + HOUR_MS, HOUR_TOLD_S_MAX)
        assert not quarter.statements, "all was said"
        assert not quarter.rows, "all was inserted"

    def _end_period(self, period: Period) -> None:
        """Its last usage is told before its invoice takes no more; nothing is on its way when it is final."""
        if not self._until_told(period.takes_until, TOLD_S_MAX):
            self._problems.append(f"not told within {TOLD_S_MAX:.0f} s: {self._missing()}")
        self._time.move_to(period.takes_until)
        time.sleep(QUIET_S)
        typer.echo(f"a period ended; {self._time.waited_s:.0f} s waited for workers")

    def _until_told(self, until_ms: int, seconds: float) -> bool:
        """Whether everything published is absorbed in time and, while Stripe can be reached, told."""
        began = time.monotonic()
        while not self._is_absorbed() or not (self._is_away(self._time.now_ms) or not self._missing()):
            if time.monotonic() - began > seconds:
                return False
            time.sleep(0.2)
            # Back-offs end; but the invoice waits until everybody had their turn.
            if (now := self._time.now_ms) + 2 * MINUTE_MS < until_ms:
                self._time.move_to(now + MINUTE_MS)
        return True

    def _is_away(self, moment: int) -> bool:
        return self._outage[0] <= moment < self._outage[1]

    def _is_absorbed(self) -> bool:
        """Whether what was said last of each window is written down; what a flush has of one is its last.

        That windows were read is not enough: who was killed amid a flush leaves their records to a successor.
        """
        return absorbed_up_to(self._places) == self._publisher.said_up_to

    def _missing(self) -> list[str]:
        self._journal.read()
        return sorted(written_down(self._places) - self._journal.identifiers)[:3]

    def _come_to_rest(self) -> None:
        """All periods are closed, and the carries of the last are told."""
        began = time.monotonic()
        closed_by = self._periods[-1].start
        while (left := unclosed(self._places, closed_by)) or self._missing():
            if time.monotonic() - began > TOLD_S_MAX:
                self._problems.append(f"{left} accounts are not closed, not told: {self._missing()}")
                return
            self._time.move_to(self._time.now_ms + 10 * MINUTE_MS)
            time.sleep(0.3)

    # -- what became of it

    def _verdict(self) -> Verdict:
        self._journal.read()
        return judge(
            Evidence(
                statements=statements_of(self._publisher.file.path),
                periods=self._periods,
                steps=list(steps(self._places)),
                counted=self._journal.counted,
                rejected=self._journal.rejected,
                invoices=final_invoices(self._stripe.sandbox),
                customers=self._customers,
                outage=self._outage,
                unit_micro=UNIT_MICRO,
            )
        )

    def _tell(self, campaign: Campaign, ended: Counter[int], verdict: Verdict) -> None:
        typer.echo(f"workers killed {campaign.killed.total()} times in {campaign.seconds:.0f} s:")
        for place in [*steps_of(billing), ANYWHERE, TAKE_OVER]:
            typer.echo(f"  {place} {campaign.killed[place]}")
        by_code = ", ".join(f"{count} with {code}" for code, count in sorted(ended.items())) or "none"
        typer.echo(f"workers that ended by themselves: {by_code}")
        typer.echo("faults of Stripe:")
        for action, count in sorted(self._stripe.applied().items()):
            typer.echo(f"  {action} {count}")
            if not count:
                self._problems.append(f"Stripe never did {action}")
        typer.echo(" ".join(f"{name}={count:,}" for name, count in verdict.counts.items()))
        typer.echo(verdict.summary)
        for detail in verdict.details():
            typer.echo(f"  {detail}")

    def _plant_and_find(self, names: list[str]) -> list[str]:
        """Mistakes made on purpose, behind everybody's back: exactly these must be reported."""
        current = self._periods[-1]
        lost = Statement(self._time.now_ms, names[0], current.start, 0, 2**40, 7_654_321)
        self._publisher.file.add([lost])
        of_other = [
            one
            for one in self._journal.counted
            if one.timestamp_s * 1000 >= current.start and one.customer != self._customers[names[0]]
        ]
        self._time.move_to(self._time.now_ms + 25 * HOUR_MS)
        double = of_other[0]
        self._stripe.count_again(double)
        (client,) = [name for name, customer in self._customers.items() if customer == double.customer]
        verdict = self._verdict()
        typer.echo(f"planted loss: {credits_text(lost.micro)} credits of {lost.client_id}")
        typer.echo(f"planted double: {double.identifier}, {double.value} units of {client}")
        found = replace(verdict, counts=Counter())
        expected = Verdict(
            lost_windows={(lost.client_id, lost.start): lost.micro},
            doubled={double.identifier: double.value},
            differences={
                (lost.client_id, current.start): -lost.micro,
                (client, current.start): double.value * UNIT_MICRO,
            },
        )
        if found != expected:
            typer.echo(f"  PROBLEM the planted mistakes were not reported exactly: {verdict.summary}")
            return ["not reported", *verdict.details()]
        typer.echo(f"planted and reported exactly: {verdict.summary}")
        return []


if __name__ == "__main__":
    typer.run(prove)
