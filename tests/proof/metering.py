"""`make prove-metering`: a million events through two workers that are killed more than a hundred times.

Real Kafka, ClickHouse's engine, 0.5 % copies and retried tasks, late events and poison. The workers die by
SIGKILL at every step the code names, and at random moments; Kafka and ClickHouse are killed too. Then an
independent checker (`metering_checker.py`) holds raw ledger rows, the newest snapshots and the newest totals
against the input file. At last it must find what is planted: events that were never published, and twins that
a producer with another partitioner made, exactly these and their credits.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from tests.proof.metering_books import EVENT, Line, lines_of
from tests.proof.metering_checker import Verdict, credits_text, judge
from tests.proof.metering_evidence import gather, is_accounted, log_ends
from tests.proof.metering_input import Lines, Publisher, Stream
from tests.proof.pipeline import places_of
from tests.proof.worker_kills import ANYWHERE, TAKE_OVER, Campaign, plan_kills, steps_of
from tests.stacks import RunningStack, running_stack
from tests.worker_nursery import NurseryWorker
from tests.worker_processes import ended_in_the_end, kept_running, until

from meterline import metering
from meterline.demo.workers import replayed_offsets

WINDOW_MS = 5_000
WORKER_SETTINGS = {
    "METERLINE_METERING__WINDOW_LENGTH_MS": str(WINDOW_MS),
    "METERLINE_METERING__ALLOWED_LATENESS_MS": "1000",
    "METERLINE_METERING__IDLE_AFTER_MS": "1000",
    "METERLINE_METERING__FLUSH_INTERVAL_MS": "100",
    "METERLINE_METERING__LATE_SNAPSHOT_INTERVAL_MS": "1000",
    # Shorter than the latest events are late: some meet a window that only the ledger remembers.
    "METERLINE_METERING__KEEP_CLOSED_WINDOWS_MS": "20000",
    "METERLINE_WORKER__SESSION_TIMEOUT_MS": "6000",
}
OUTAGES = ("kafka", "clickhouse")
KILLS_PER_OUTAGE = 20
"""Every so many kills of workers, both services are killed once."""
WORKING_S_MAX = 180.0
ACCOUNTED_S_MAX = 300.0
QUIET_S = 12.0
"""Longer than a window, the lateness, an idle moment and the cadence of late snapshots together: whatever is
due is published by then."""
SETTLED_S_MAX = 180.0
PLANTED_EVENTS = 7
PLANTS = ("loss", "double")
PLANT_EVENTS, PLANT_KILLS = 20_000, 12


class Plant:
    """Mistakes made on purpose, outside of the pipeline; the checker must report them, and nothing else."""

    def __init__(self) -> None:
        self.lost: dict[str, int] = {}
        self.duplicated: dict[str, int] = {}

    def make(self, names: Sequence[str], publisher: Publisher, partitions: int) -> None:
        """Withhold events, or publish counted ones once more where dedupe doesn't look."""
        withheld = publisher.withhold(PLANTED_EVENTS) if "loss" in names else []
        self.lost = {line.event_id: line.micro for line in withheld}
        if "double" in names:
            # Of clients that lost nothing: what is too much and too little of one client would cancel out.
            lines = _first_events(publisher.file.path, without={line.client_id for line in withheld})
            publisher.twin(lines, partitions)
            self.duplicated = {line.event_id: line.micro for line in lines}
        publisher.flush()

    def is_reported_by(self, verdict: Verdict) -> bool:
        """Exactly these events, and in every book exactly their credits."""
        micro = sum(self.lost.values()) + sum(self.duplicated.values())
        found = verdict.lost, verdict.duplicated, set(verdict.differences.values())
        return found == (self.lost, self.duplicated, {micro})


def prove(
    *,
    events: Annotated[int, typer.Option(min=1_000, help="Different events.")] = 1_000_000,
    kills: Annotated[int, typer.Option(min=12, help="SIGKILLs of workers.")] = 108,
    seed: Annotated[int, typer.Option(help="Of the input and of the kills.")] = 1,
    minutes: Annotated[
        float, typer.Option(help="After these no worker is killed any more, which fails.")
    ] = 15,
    plant: Annotated[str, typer.Option(help=f"A short run with a mistake: {' or '.join(PLANTS)}.")] = "",
) -> None:
    """Exit code 0: nothing lost, nothing counted twice, no credit differs. 1: otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything started is stopped, as on Ctrl-C
    logging.getLogger("meterline.producer").setLevel(logging.CRITICAL)  # complains of every outage we make
    if plant and plant not in PLANTS:
        raise typer.BadParameter(f"{plant} is none of {', '.join(PLANTS)}")
    if plant:
        events, kills = min(events, PLANT_EVENTS), min(kills, PLANT_KILLS)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="meterline-proof-"))
    with running_stack("local") as stack:
        run = Run(stack, folder, seed)
        problems = run.live_through_it(events, kills, began + minutes * 60, plant)
    if problems:
        typer.echo(f"the workers' logs and the input are in {folder}")
    else:
        shutil.rmtree(folder)
    typer.echo(f"metering: {'wrong' if problems else 'proved'} ({time.monotonic() - began:.0f} s)")
    raise typer.Exit(1 if problems else 0)


class Run:
    """One stack, two workers, one input file."""

    def __init__(self, stack: RunningStack, folder: Path, seed: int) -> None:
        self._stack, self._folder, self._seed = stack, folder, seed
        self._places = places_of(stack)
        environment = stack.process_environment() | WORKER_SETTINGS
        self._workers = [
            # Static members: a restarted worker goes on with its partitions at once, if it is quick.
            NurseryWorker("metering", environment, folder, METERLINE_WORKER__INSTANCE_ID=f"metering-{n}")
            for n in (1, 2)
        ]

    def live_through_it(self, events: int, kills: int, deadline: float, plant: str) -> list[str]:
        """The whole run; what is wrong."""
        publisher = Publisher(self._stack.settings, self._folder / "input.csv", Lines(self._seed))
        outages = OUTAGES * max(1, kills // KILLS_PER_OUTAGE // len(OUTAGES))
        plan = plan_kills(kills, self._seed, steps_of(metering))
        campaign = Campaign(self._stack, self._workers, plan, outages, deadline, typer.echo)
        with ExitStack() as running:
            running.enter_context(ended_in_the_end(*self._workers))
            running.enter_context(publisher)
            for worker in self._workers:
                worker.start()
            publisher.publish(1_000)
            publisher.flush()
            until(lambda: is_accounted(self._places), "first progress", WORKING_S_MAX)
            for worker in self._workers:
                worker.kill()
            with Stream(publisher, events - 1_000, campaign.seconds_left):
                campaign.run()
                ended = running.enter_context(kept_running(*self._workers))
            planted = Plant()
            if plant:
                planted.make([plant], publisher, self._partitions())
            verdict = self._settled_verdict()
            self._tell(campaign, campaign.ended + ended, verdict)
            problems = [*campaign.problems, *([] if verdict.is_conserved else [verdict.summary])]
            if not plant and not problems:
                planted.make(PLANTS, publisher, self._partitions())
                verdict = self._settled_verdict()
            problems += _planted_and_reported(planted, verdict)
        for problem in campaign.problems:
            typer.echo(f"  PROBLEM {problem}")
        return problems

    def _partitions(self) -> int:
        return len(log_ends(self._places, "usage.events"))

    def _settled_verdict(self) -> Verdict:
        """When everything is accounted and nothing more is said of windows, look at all of it, once."""
        until(lambda: is_accounted(self._places), "everything is accounted", ACCOUNTED_S_MAX)
        deadline = time.monotonic() + SETTLED_S_MAX
        said, since = log_ends(self._places, "usage.windows"), time.monotonic()
        while time.monotonic() - since < QUIET_S and time.monotonic() < deadline:
            time.sleep(1)
            if (now := log_ends(self._places, "usage.windows")) != said:
                said, since = now, time.monotonic()
        return judge(gather(self._places, self._folder / "input.csv", WINDOW_MS))

    def _tell(self, campaign: Campaign, ended: Counter[int], verdict: Verdict) -> None:
        places = [*steps_of(metering), ANYWHERE, TAKE_OVER]
        typer.echo(
            f"workers killed {campaign.killed.total()} times in {campaign.seconds:.0f} s, after first "
            "progress:"
        )
        for place in places:
            typer.echo(f"  {place} {campaign.killed[place]}")
        services = ", ".join(f"{name} {count} times" for name, count in campaign.outages.items()) or "none"
        by_code = ", ".join(f"{count} with {code}" for code, count in sorted(ended.items())) or "none"
        typer.echo(f"services killed: {services}; workers that ended by themselves: {by_code}")
        typer.echo(
            f"{replayed_offsets(self._workers):,} offsets read again although their rows were in the ledger"
        )
        typer.echo(" ".join(f"{name}={count:,}" for name, count in verdict.counts.items()))
        typer.echo(verdict.summary)
        for detail in verdict.details():
            typer.echo(f"  {detail}")


def _planted_and_reported(planted: Plant, verdict: Verdict) -> list[str]:
    for what, events in (("loss", planted.lost), ("double", planted.duplicated)):
        if events:
            typer.echo(
                f"planted {what}: {credits_text(sum(events.values()))} credits, {', '.join(sorted(events))}"
            )
    if planted.lost or planted.duplicated:
        if planted.is_reported_by(verdict):
            typer.echo(f"planted and reported exactly: {verdict.summary}")
        else:
            typer.echo(f"  PROBLEM the planted mistakes were not reported exactly: {verdict.summary}")
            return ["not reported", *verdict.details()]
    return []


def _first_events(path: Path, without: Container[str]) -> list[Line]:
    events = (line for line in lines_of(path) if line.kind == EVENT and line.client_id not in without)
    return list(islice(events, PLANTED_EVENTS))


if __name__ == "__main__":
    typer.run(prove)
