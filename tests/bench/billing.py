"""`make bench-billing`: windows per second that a billing worker verifies, commits and gets accepted.

One local stack (real Kafka, ClickHouse's engine, the Stripe sandbox with its limits off), one billing worker
as it is shipped, several rounds. A round is an hour's edge: each of some thousand clients has one closed
window, whose event is in the ledger; then all of them are published at once, and the clock runs.

* committed: each window was verified against the ledger and valued, its usage record is in the changelog and
  in the ledger. While this goes on, the first records are sent already.
* accepted: the answer to each request is in the ledger, too.

CPU time is user and system time of the worker's process, all its threads; that of the services beside it is
shown to see whom the others waited for. The worker may make as many requests as Stripe's live limit allows,
and keeps to a part of it (`billing.pace`).

In the end every client's units are compared: by Stripe's own summaries, and by the ledger's raw rows.

From the medians follows how long the edge of an hour takes with 100,000 clients at Stripe's live limit: the
slowest part decides, and is named. A busy machine makes the measured rate smaller than the CPU time does.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from clickhouse_driver import Client as ClickHouse
from rich.console import Console
from rich.table import Table
from tests.bench.measured import RUN_TIMEOUT_S, START_TIMEOUT_S, BenchError, Worker, is_ready, started
from tests.stacks import RunningStack, running_stack
from tests.window_feed import WindowFeed, this_hour_ms

from meterline.billing.pace import USED_SHARE
from meterline.billing.send import THREADS
from meterline.contracts.topics import USAGE_WINDOWS, load_topics
from meterline.errors import MeterlineError
from meterline.local.ports import Ports

HOUR_MS = 3_600_000
MICRO = 1_000_000
LIVE_LIMIT_PER_S = 1_000
"""Meter events of one account in live mode, as Stripe documents it."""
EDGE_CLIENTS = 100_000
ANSWER_S = 0.1
"""What an answer of Stripe's may take over the internet: the sandbox's come at once. An assumption."""
POLL_INTERVAL_S = 0.1

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Look:
    """The clock, the CPU time of everyone, and how far billing is."""

    at_s: float
    cpu_s: Mapping[str, float]
    committed: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Phase:
    """From one look to another one.

    Attributes:
        cores: how much of a core each process used, by name.
    """

    windows: int
    wall_s: float
    cores: Mapping[str, float]

    @classmethod
    def between(cls, before: Look, after: Look, windows: int) -> Phase:
        wall_s = after.at_s - before.at_s
        return cls(
            windows,
            wall_s,
            {name: (after.cpu_s[name] - cpu_s) / wall_s for name, cpu_s in before.cpu_s.items()},
        )

    @property
    def windows_per_s(self) -> float:
        return self.windows / self.wall_s

    @property
    def cpu_s_per_thousand(self) -> float:
        return self.cores["worker"] * self.wall_s / self.windows * 1_000


@dataclass(frozen=True, slots=True)
class Round:
    """One edge of an hour: until all was committed, and until all was accepted."""

    committed: Phase
    accepted: Phase


class Bench:
    """One worker on a stack."""

    def __init__(self, stack: RunningStack, directory: Path, clients: int) -> None:
        self._stack = stack
        self._clients = [f"client-{number}" for number in range(clients)]
        self._log_file = directory / "worker.log"
        self._directory = directory

    def run(self, rounds: int) -> tuple[list[Round], list[str]]:
        """All rounds, and what is wrong in the end."""
        environment = self._stack.process_environment() | {
            "METERLINE_BILLING__REQUESTS_PER_SECOND": str(LIVE_LIMIT_PER_S),
            "METERLINE_WORKER__DATA_DIR": str(self._directory / "worker"),
        }
        self._feed = feed = WindowFeed(self._stack.settings)
        console.print(f"{len(self._clients):,} clients, each with a customer at the sandbox", style="dim")
        feed.add_clients(self._clients)
        where = self._stack.settings.clickhouse
        self._ledger = ClickHouse(where.host, where.port, where.database)
        port = Ports.free().stripe
        command = [str(Path(sys.executable).with_name("meterline")), "worker", "billing"]
        with started([*command, "--web-port", str(port)], environment, self._log_file) as worker:
            worker.wait(lambda: int(is_ready(port)), 1, START_TIMEOUT_S)
            done = []
            for number in range(rounds):
                console.print(f"round {number + 1} of {rounds}", style="dim")
                done.append(self._round(worker, number))
        console.print("comparing totals", style="dim")
        wrong = self._wrong()
        self._ledger.disconnect()
        feed.close()
        return done, wrong

    def _round(self, worker: Worker, number: int) -> Round:
        clients = len(self._clients)
        start = this_hour_ms() - (number + 1) * HOUR_MS
        # A whole unit in each window, and a remainder that makes one more now and then.
        usage = ((name, start, MICRO + at * 997 % 900_000) for at, name in enumerate(self._clients))
        snapshots = self._feed.record(usage)
        wanted, before = (number + 1) * clients, self._look(worker)
        self._feed.publish(snapshots)
        committed = self._wait(worker, "committed", wanted)
        accepted = self._wait(worker, "accepted", wanted)
        return Round(Phase.between(before, committed, clients), Phase.between(before, accepted, clients))

    def _wait(self, worker: Worker, what: str, wanted: int) -> Look:
        looks: list[Look] = []

        def counted() -> int:
            looks[:] = [self._look(worker)]
            return int(getattr(looks[0], what))

        worker.wait(counted, wanted, RUN_TIMEOUT_S, POLL_INTERVAL_S)
        return looks[0]

    def _look(self, worker: Worker) -> Look:
        ((committed, accepted),) = self._ledger.execute(
            "SELECT countIf(kind = 'record'), countIf(kind = 'outcome' AND state = 'accepted')"
            " FROM usage_record_log"
        )
        cpu_s = {"worker": worker.cpu_s()}
        for service in self._stack.local.status():
            if service.pid is not None and service.name != "redis":
                times = psutil.Process(service.pid).cpu_times()
                cpu_s[service.name] = times.user + times.system
        return Look(time.monotonic(), cpu_s, committed, accepted)

    def _wrong(self) -> list[str]:
        """Units of each client at Stripe, and by the identifiers of the ledger, each of which counts once."""
        owed, told = self._feed.owed_units(), self._feed.units_at_stripe()
        rows = self._ledger.execute(
            "SELECT client_id, sum(value) FROM (SELECT client_id, identifier, any(value) AS value"
            " FROM usage_record_log WHERE kind = 'outcome' AND state = 'accepted'"
            " GROUP BY client_id, identifier) GROUP BY client_id"
        )
        written = {client: int(value) for client, value in rows}
        return [
            f"{client}: {units} units owed, Stripe has {told.get(client)}, the ledger {written.get(client)}"
            for client, units in owed.items()
            if not units == told.get(client) == written.get(client)
        ]


@dataclass(frozen=True, slots=True)
class Edge:
    """How long the edge of an hour takes with 100,000 clients and one worker. The parts overlap.

    Attributes:
        parts: seconds that each needs by itself, by what it is.
        workers: with so many, each on a core of its own, Stripe's limit decides.
    """

    parts: Mapping[str, float]
    workers: int

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def seconds(self) -> float:
        return self.parts[self.bottleneck]


LIMIT_S = EDGE_CLIENTS / (LIVE_LIMIT_PER_S * USED_SHARE)


def edge_of(done: list[Round]) -> Edge:
    """From the medians of all rounds."""
    committed = statistics.median(r.committed.windows_per_s for r in done)
    accepted = statistics.median(r.accepted.windows_per_s for r in done)
    by_cpu = 1_000 / statistics.median(r.accepted.cpu_s_per_thousand for r in done)
    cores = _cores(done)
    busiest = max(cores, key=lambda name: cores[name])
    parts = {
        f"Stripe's live limit, {LIVE_LIMIT_PER_S:,}/s, of which {USED_SHARE:.0%} is used": LIMIT_S,
        f"verifying and committing, {committed:,.0f}/s as measured": EDGE_CLIENTS / committed,
        f"all until accepted, {accepted:,.0f}/s as measured; most CPU time took {busiest}, "
        f"{cores[busiest]:.2f} cores": EDGE_CLIENTS / accepted,
        f"the worker's CPU time, {by_cpu:,.0f}/s if it had a core to itself": EDGE_CLIENTS / by_cpu,
        f"{THREADS} requests at a time, were each answer to take {ANSWER_S:.1f} s": (
            EDGE_CLIENTS * ANSWER_S / THREADS
        ),
    }
    return Edge(parts, math.ceil(max(EDGE_CLIENTS / by_cpu, EDGE_CLIENTS * ANSWER_S / THREADS) / LIMIT_S))


def _cores(done: list[Round]) -> dict[str, float]:
    """Median of the cores each process used, by name."""
    return {name: statistics.median(r.accepted.cores[name] for r in done) for name in done[0].accepted.cores}


def bench(
    clients: Annotated[int, typer.Option(min=100, help="Clients, each with a window in a round.")] = 4_000,
    *,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Edges of an hour.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Windows per second: verified, committed and accepted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything started is stopped, as on Ctrl-C
    try:
        with (
            tempfile.TemporaryDirectory(prefix="meterline-bench-") as directory,
            running_stack("local") as stack,
        ):
            done, wrong = Bench(stack, Path(directory), clients).run(rounds)
    except (BenchError, MeterlineError) as error:
        console.print(f"{error}", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(_report(done, wrong)))
    else:
        _show(done, wrong, clients)
    raise typer.Exit(1 if wrong else 0)


def _report(done: list[Round], wrong: list[str]) -> dict[str, Any]:
    def values(phase: Phase) -> dict[str, Any]:
        return {
            "windows_per_s": round(phase.windows_per_s, 1),
            "cpu_s_per_thousand": round(phase.cpu_s_per_thousand, 3),
            "cores": {name: round(cores, 2) for name, cores in phase.cores.items()},
        }

    edge = edge_of(done)
    return {
        "rounds": [{"committed": values(r.committed), "accepted": values(r.accepted)} for r in done],
        "edge_s": {part: round(seconds) for part, seconds in edge.parts.items()},
        "bottleneck": edge.bottleneck,
        "workers_for_the_limit": edge.workers,
        "wrong_totals": wrong,
    }


def _show(done: list[Round], wrong: list[str], clients: int) -> None:
    table = Table(
        title="Windows per second, and the worker's CPU seconds per 1,000 of them",
        caption=f"{clients:,} clients, one window each, one worker. Cores used until all was accepted:\n"
        + ", ".join(f"{name} {cores:.2f}" for name, cores in _cores(done).items()),
        caption_justify="left",
    )
    for heading in ("round", "committed/s", "CPU s", "accepted/s", "CPU s"):
        table.add_column(heading, justify="right")

    def cells(of: list[Round]) -> list[str]:
        found = []
        for phases in ([r.committed for r in of], [r.accepted for r in of]):
            found.append(f"{statistics.median(phase.windows_per_s for phase in phases):,.0f}")
            found.append(f"{statistics.median(phase.cpu_s_per_thousand for phase in phases):.2f}")
        return found

    for number, one in enumerate(done, start=1):
        table.add_row(str(number), *cells([one]))
    table.add_section()
    table.add_row("median", *cells(done), style="bold")
    edge = edge_of(done)
    out = Console(soft_wrap=True, highlight=False)
    out.print(table)
    out.print(f"\nAn hour's edge of {EDGE_CLIENTS:,} clients and one worker, in seconds:")
    for part, seconds in edge.parts.items():
        out.print(f"  {seconds:6,.0f}  {part}", markup=False)
    out.print(f"So {edge.seconds:,.0f} s; the bottleneck: {edge.bottleneck}.", markup=False)
    at_most = load_topics()[USAGE_WINDOWS].partitions
    out.print(
        f"With {edge.workers} workers, each on a core of its own, {LIMIT_S:,.0f} s; the bottleneck is then "
        f"Stripe's limit. {USAGE_WINDOWS} has partitions for {at_most} as shipped."
    )
    if wrong:
        out.print(f"{len(wrong)} wrong totals:", *wrong[:20], sep="\n  ", markup=False)
    else:
        out.print(
            f"All totals right: {len(done) * clients:,} windows, by client, at Stripe and in the ledger."
        )


if __name__ == "__main__":
    typer.run(bench)
