"""`make bench`: CPU time per million events of a metering worker, and of the stock Faust idiom beside it.

One local stack (real Kafka, ClickHouse's engine), one run after the other, alternating, several rounds; every
total of both sides is compared with the generator's own sums, and a wrong one fails the bench.

What is counted: user and system time of the worker's process, all its threads, without its start-up. Both
read the same kind of bytes (the published schema, single-object framing, the same skewed clients); the
publisher, the broker and ClickHouse are other processes and not counted. Ours finds a backlog: its clock runs
from the moment it has its partitions until the last event is committed, and no time goes by waiting for a
publisher, in which its loop would turn for nothing. Stock is slower than the publisher by far: its clock runs
from right before its events are published, the first 1,000 of them apart.

* Ours is `meterline worker metering` as it is shipped, twice: on the fast path (extra `fast`), on the plain
  one. Decode, checks, exact dedupe, rows acknowledged by the ledger, changelog and window snapshots in Kafka
  transactions, and the closing of windows. "Committed" includes all that. Answering its metrics page ten
  times a second is in its figure.
* Stock is `stock_faust.py`: Record, codec, tumbling table with changelog. It keeps the sums only: no checks,
  no dedupe, no ledger, no closing, at least once. Its clock stops when the broker has the last change of its
  table; the offset commit after it is not counted, and its progress is read at the broker.

So stock is given less work. One difference is for us: a run of ours has more events, so that what a run costs
whatever its size (connections, closing the same ten windows) is shared by more of them. Set here: windows of
2 s and no lateness, so that they close inside the run and not in an hour. There are no duplicates, because
stock would count them: dedupe is paid for, but not put to the test here. A busy machine raises CPU time too:
compare by the ratio, within a run.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tests.bench.measured import BenchError, Measurement, measure_ours, measure_stock, stock_changelog
from tests.bench.totals import wrong_in_ledger, wrong_in_snapshots, wrong_in_stock
from tests.bench.workload import (
    CLIENTS,
    SKUS,
    WARM_UP_EVENTS,
    WINDOW_LENGTH_MS,
    WINDOWS,
    Workload,
    make_workload,
)

from meterline.contracts.topic_admin import TopicAdmin
from meterline.contracts.topics import load_topics
from meterline.errors import MeterlineError
from meterline.ledger.migrate import apply_migrations
from meterline.local.ports import Ports
from meterline.local.stack import Stack
from meterline.settings import ClickHouseSettings, KafkaSettings

AHEAD_MS = 60_000
"""Event time starts this far ahead of the clock, so that the watermark of an idle partition, which follows
the clock, can't pass it before the run. A run ends within the five minutes that a worker allows."""

WINDOWS_OF_A_RUN = WINDOWS + 1
"""Windows of a run, and the one its closing events stand in."""

EVENTS_MIN = 2 * WARM_UP_EVENTS

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Round:
    """All sides, measured one right after the other."""

    fast: Measurement
    plain: Measurement
    stock: Measurement


class Bench:
    """One stack and what was measured on it."""

    def __init__(self, directory: Path) -> None:
        self.ports = Ports.free()
        self.stack = Stack(directory / "stack", self.ports)
        self.wrong: list[str] = []
        self._directory = directory
        self._kafka = KafkaSettings(bootstrap_servers=f"127.0.0.1:{self.ports.kafka}")
        self._clickhouse = ClickHouseSettings(port=self.ports.clickhouse)
        self._event_time_ms = 0

    def prepare(self) -> None:
        """Services, topics, tables."""
        self.stack.up()
        TopicAdmin(self._kafka).apply(load_topics())
        apply_migrations(self._clickhouse)

    def run_ours(self, number: int, events: int, *, fast: bool) -> Measurement:
        """One run of a metering worker, totals checked."""
        work = self._workload(events, 2 * number + fast)
        broker = self._kafka.bootstrap_servers
        log = self._directory / f"{'fast' if fast else 'plain'}-{number}.log"
        measured = measure_ours(work, broker, self._environment(fast=fast), Ports.free().stripe, log)
        self.wrong += wrong_in_ledger(work, self._clickhouse) + wrong_in_snapshots(work, broker)
        return measured

    def run_stock(self, number: int, events: int) -> Measurement:
        """One run of the stock idiom, totals checked."""
        work = self._workload(events, -number)
        broker, name = self._kafka.bootstrap_servers, f"bench-stock-{number}"
        measured = measure_stock(work, broker, name, self._directory / f"{name}.log")
        self.wrong += wrong_in_stock(work, broker, stock_changelog(name))
        return measured

    def _workload(self, events: int, seed: int) -> Workload:
        """Events behind those of every earlier run: nothing of a run is late."""
        start = max(time.time_ns() // 1_000_000 + AHEAD_MS, self._event_time_ms)
        start -= start % -WINDOW_LENGTH_MS
        self._event_time_ms = start + WINDOWS_OF_A_RUN * WINDOW_LENGTH_MS
        return make_workload(events, start, seed)

    def _environment(self, *, fast: bool) -> Mapping[str, str]:
        return {
            "METERLINE_METERING__FAST_PATH": str(fast).lower(),
            **self.stack.environment(),
            "METERLINE_METERING__WINDOW_LENGTH_MS": str(WINDOW_LENGTH_MS),
            "METERLINE_METERING__ALLOWED_LATENESS_MS": "0",
            "METERLINE_WORKER__DATA_DIR": str(self._directory / "worker"),
        }


def bench(
    events: Annotated[int, typer.Option(min=EVENTS_MIN, help="Events of a fast run.")] = 1_000_000,
    plain_events: Annotated[int, typer.Option(min=EVENTS_MIN, help="Events of a plain run.")] = 200_000,
    stock_events: Annotated[int, typer.Option(min=EVENTS_MIN, help="Events of a stock run.")] = 12_000,
    *,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Runs of each; they alternate.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """CPU time per million events: a metering worker, and stock Faust beside it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything started is stopped, as on Ctrl-C
    done: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="meterline-bench-") as directory:
        run = Bench(Path(directory))
        try:
            with console.status("starting Kafka and ClickHouse") as status:
                run.prepare()
                for number in range(1, rounds + 1):
                    status.update(f"round {number} of {rounds}: fast path, {events:,} events")
                    fast = run.run_ours(number, events, fast=True)
                    status.update(f"round {number} of {rounds}: plain path, {plain_events:,} events")
                    plain = run.run_ours(number, plain_events, fast=False)
                    status.update(f"round {number} of {rounds}: stock Faust, {stock_events:,} events")
                    done.append(Round(fast, plain, run.run_stock(number, stock_events)))
        except (BenchError, MeterlineError) as error:
            console.print(f"Error: {error}", markup=False)
            raise typer.Exit(1) from error
        finally:
            run.stack.down(wipe=True)
    if as_json:
        typer.echo(json.dumps(_report(done, run.wrong), indent=2))
    else:
        _show(done, run.wrong)
    raise typer.Exit(1 if run.wrong else 0)


def _medians(done: list[Round]) -> tuple[float, float, float]:
    return (
        statistics.median(r.fast.cpu_s_per_million for r in done),
        statistics.median(r.plain.cpu_s_per_million for r in done),
        statistics.median(r.stock.cpu_s_per_million for r in done),
    )


def _report(done: list[Round], wrong: list[str]) -> dict[str, Any]:
    fast, plain, stock = _medians(done)

    def values(run: Measurement) -> dict[str, float]:
        return {
            "events": run.events,
            "cpu_s": round(run.cpu_s, 3),
            "cpu_s_per_million": round(run.cpu_s_per_million, 2),
            "events_per_s": round(run.events_per_s),
            "memory_mib": round(run.memory_mib),
        }

    return {
        "rounds": [
            {"fast": values(r.fast), "plain": values(r.plain), "stock": values(r.stock)} for r in done
        ],
        "median_cpu_s_per_million": {
            "fast": round(fast, 2), "plain": round(plain, 2), "stock": round(stock, 2),
        },
        "ratio": {"fast": round(stock / fast, 1), "plain": round(stock / plain, 1)},
        "cython": _cython(),
        "wrong_totals": wrong,
    }  # fmt: skip


def _show(done: list[Round], wrong: list[str]) -> None:
    table = Table(
        title="CPU seconds per million events, events/s, most memory (MiB), times fewer CPU than stock",
        caption=(
            f"{CLIENTS} clients (skewed), {SKUS} SKUs, {WINDOWS} windows a run. Stock Faust: Cython "
            f"{'on' if _cython() else 'off'}, memory store.\n"
            "Ours includes dedupe, the ledger and transactions; stock keeps the sums only."
        ),
        caption_justify="left",
    )
    for heading in ("round", "path", "CPU s/M", "events/s", "MiB", "x stock"):
        table.add_column(heading, justify="right")
    for number, r in enumerate(done, start=1):
        for path, run in (("fast", r.fast), ("plain", r.plain), ("stock", r.stock)):
            table.add_row(
                str(number),
                path,
                f"{run.cpu_s_per_million:.2f}",
                f"{run.events_per_s:,.0f}",
                f"{run.memory_mib:,.0f}",
                f"{r.stock.cpu_s_per_million / run.cpu_s_per_million:.1f}",
            )
        table.add_section()
    fast, plain, stock = _medians(done)
    for path, median in (("fast", fast), ("plain", plain), ("stock", stock)):
        table.add_row("median", path, f"{median:.2f}", "", "", f"{stock / median:.1f}", style="bold")
    out = Console()
    out.print(table)
    if wrong:
        out.print("Wrong totals:", *wrong, sep="\n  ", markup=False)
    else:
        counted = sum(r.fast.events + r.plain.events + r.stock.events + WARM_UP_EVENTS for r in done)
        out.print(f"All totals right: {counted:,} events, by client, window and SKU, to the micro-credit.")


def _cython() -> bool:
    """Whether the built streams of Faust are there; it takes them by itself then."""
    return find_spec("faust._cython.streams") is not None


if __name__ == "__main__":
    typer.run(bench)
