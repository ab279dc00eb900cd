"""`make bench`: CPU time per million events of a metering worker, and of what others do beside it.

One local stack (real Kafka, ClickHouse's engine), one run after the other, alternating, several rounds; every
total of both sides is compared with the generator's own sums, and a wrong one fails the bench.

What is counted: user and system time of the worker's process, all its threads, without its start-up. Both
read the same kind of bytes (the published schema, single-object framing, the same skewed clients); the
publisher, the broker and ClickHouse are other processes and not counted. Ours finds a backlog: its clock runs
from the moment it has its partitions until the last event is committed, and no time goes by waiting for a
publisher, in which its loop would turn for nothing. The others are slower than the publisher: their clock
runs from right before their events are published, the first 1,000 of them apart.

* Ours is `meterline worker metering` as it is shipped: on the fast path (extra `fast`), one worker, and two
  that share the partitions, and this machine with the broker; on the plain path. Decode, checks, exact
  dedupe, rows acknowledged by the ledger, changelog and window snapshots in Kafka transactions, and the
  closing of windows. "Committed" includes all that. Answering its metrics page twice a second is in its
  figure.
* Stock is `stock_faust.py`: Record, codec, tumbling table with changelog. It keeps the sums only: no checks,
  no dedupe, no ledger, no closing, at least once. Its clock stops when the broker has the last change of its
  table; the offset commit after it is not counted, and its progress is read at the broker.

* Quix Streams (`quix_streams.py`, at least once as is its default, and exactly once) and Kafka Streams
  (`KafkaStreamsBench.java`, exactly_once_v2, suppress): a tumbling sum, each window's final result written
  once. Their records are keyed by client and SKU already, so that they need no repartition topic. Their clock
  stops when their group has committed the last offset. Quix Streams needs an environment of its own, Kafka
  Streams a Java with its compiler; who isn't there is left out, and the table says so.

So the others are given less work. One difference is for us: a run of ours has more events, so that what a
run costs whatever its size (connections, closing the same ten windows) is shared by more of them: on the fast
path about 1.6 s of CPU time, as much as 0.9 million events. At its rate windows of an hour would hold a
thousand times as many. Set here:
windows of 2 s and no lateness, so that they close inside the run and not in an hour. There are no duplicates,
because the others would count them: dedupe is paid for, but not put to the test here. A busy machine raises
CPU time too: compare by the ratio, within a run.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tests.bench.measured import BenchError, Measurement, measure_ours, measure_stock, stock_changelog
from tests.bench.others import kafka_streams_command, measure_other, quix_command, sums_topic
from tests.bench.totals import wrong_in_ledger, wrong_in_snapshots, wrong_in_stock, wrong_in_sums
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

TABLE_WIDTH = 150

EVENTS_MIN = 2 * WARM_UP_EVENTS

console = Console(stderr=True)


Rounds = dict[str, list[Measurement]]
"""What was measured, by side, in the order of `SIDES`."""

FAST_TWICE = "fast-twice"
SIDES = {
    "fast": "dedupe, ledger, windows, totals; exactly once",
    FAST_TWICE: "the same; sums of two workers",
    "plain": "the same",
    "stock": "sums in memory; no ledger, no dedupe, no closing; at least once",
    "quix": "sums; no ledger, no dedupe; at least once",
    "quix-eos": "sums; no ledger, no dedupe; exactly once inside Kafka",
    "kafka-streams": "sums; no ledger, no dedupe; exactly once inside Kafka (v2), suppress",
}
"""Who is measured, and what each does of the work."""

OURS = "fast", FAST_TWICE, "plain"


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

    def run_ours(self, side: str, number: int, events: int) -> Measurement:
        """One run of the workers of a side, totals checked."""
        work = self._workload(events, len(OURS) * number + OURS.index(side))
        broker = self._kafka.bootstrap_servers
        ports = [Ports.free().stripe for _ in range(2 if side == FAST_TWICE else 1)]
        log = self._directory / f"{side}-{number}.log"
        measured = measure_ours(work, broker, self._environment(fast=side != "plain"), ports, log)
        self.wrong += wrong_in_ledger(work, self._clickhouse) + wrong_in_snapshots(work, broker)
        return measured

    def run_stock(self, number: int, events: int) -> Measurement:
        """One run of the stock idiom, totals checked."""
        work = self._workload(events, -number)
        broker, name = self._kafka.bootstrap_servers, f"bench-stock-{number}"
        measured = measure_stock(work, broker, name, self._directory / f"{name}.log")
        self.wrong += wrong_in_stock(work, broker, stock_changelog(name))
        return measured

    def run_other(self, side: str, command: list[str], number: int, events: int) -> Measurement:
        """One run of another library, totals checked."""
        work = self._workload(events, 1_000 + number)
        broker, name = self._kafka.bootstrap_servers, f"bench-{side}-{number}"
        guarantee = {"BENCH_GUARANTEE": "exactly-once" if side == "quix-eos" else "at-least-once"}
        log = self._directory / f"{name}.log"
        measured = measure_other(work, broker, name, command=command, environment=guarantee, log=log)
        self.wrong += wrong_in_sums(work, broker, sums_topic(name), side)
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
    events: Annotated[int, typer.Option(min=EVENTS_MIN, help="Events of a fast run.")] = 3_000_000,
    plain_events: Annotated[int, typer.Option(min=EVENTS_MIN, help="Events of a plain run.")] = 500_000,
    stock_events: Annotated[int, typer.Option(min=EVENTS_MIN, help="Events of a stock run.")] = 12_000,
    quix_events: Annotated[int, typer.Option(min=EVENTS_MIN, help="Events of a Quix run.")] = 100_000,
    streams_events: Annotated[int, typer.Option(min=EVENTS_MIN, help="Of a Kafka Streams run.")] = 500_000,
    *,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Runs of each; they alternate.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """CPU time per million events: a metering worker, and what others do beside it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything started is stopped, as on Ctrl-C
    done: Rounds = {}
    with tempfile.TemporaryDirectory(prefix="meterline-bench-") as directory:
        run = Bench(Path(directory))
        runs: dict[str, tuple[int, Callable[[int], Measurement]]] = {
            side: (count, partial(run.run_ours, side, events=count))
            for side, count in zip(OURS, (events, events, plain_events), strict=True)
        }
        runs["stock"] = stock_events, partial(run.run_stock, events=stock_events)
        quix, streams = quix_command(), kafka_streams_command()
        others = {"quix": (quix, quix_events), "quix-eos": (quix, quix_events)}
        for side, (command, count) in {**others, "kafka-streams": (streams, streams_events)}.items():
            if command is not None:
                runs[side] = count, partial(run.run_other, side, command, events=count)
        try:
            with console.status("starting Kafka and ClickHouse") as status:
                run.prepare()
                for number in range(1, rounds + 1):
                    for side, (count, measure) in runs.items():
                        status.update(f"round {number} of {rounds}: {side}, {count:,} events")
                        done.setdefault(side, []).append(measure(number))
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


def _median_cpu_s(done: Rounds, side: str) -> float:
    return statistics.median(run.cpu_s_per_million for run in done[side])


def _report(done: Rounds, wrong: list[str]) -> dict[str, Any]:
    def values(run: Measurement) -> dict[str, float]:
        return {
            "events": run.events,
            "cpu_s": round(run.cpu_s, 3),
            "cpu_s_per_million": round(run.cpu_s_per_million, 2),
            "events_per_s": round(run.events_per_s),
            "memory_mib": round(run.memory_mib),
        }

    cpu_s = {side: _median_cpu_s(done, side) for side in done}
    return {
        "rounds": {side: [values(run) for run in runs] for side, runs in done.items()},
        "median_cpu_s_per_million": {side: round(median, 2) for side, median in cpu_s.items()},
        "times_fast": {side: round(median / cpu_s["fast"], 1) for side, median in cpu_s.items()},
        "times_plain": {side: round(median / cpu_s["plain"], 1) for side, median in cpu_s.items()},
        "left_out": [side for side in SIDES if side not in done],
        "cython": _cython(),
        "wrong_totals": wrong,
    }


def _show(done: Rounds, wrong: list[str]) -> None:
    rounds = len(done["fast"])
    table = Table(
        title=f"Medians of {rounds} round(s): CPU seconds per million events, events/s, most memory (MiB)",
        caption=(
            f"{CLIENTS} clients (skewed), {SKUS} SKUs, {WINDOWS} windows a run. Stock Faust: Cython "
            f"{'on' if _cython() else 'off'}, memory store. / fast, / plain: times the CPU time of that path."
        ),
        caption_justify="left",
    )
    for heading in ("side", "CPU s/M", "lowest", "highest", "events/s", "MiB", "/ fast", "/ plain"):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    table.add_column("does")
    for side, runs in done.items():
        cpu_s = sorted(run.cpu_s_per_million for run in runs)
        median = _median_cpu_s(done, side)
        table.add_row(
            side,
            f"{median:.2f}",
            f"{cpu_s[0]:.2f}",
            f"{cpu_s[-1]:.2f}",
            f"{statistics.median(run.events_per_s for run in runs):,.0f}",
            f"{max(run.memory_mib for run in runs):,.0f}",
            f"{median / _median_cpu_s(done, 'fast'):.1f}",
            f"{median / _median_cpu_s(done, 'plain'):.1f}",
            SIDES[side],
        )
    out = Console(width=max(Console().width, TABLE_WIDTH))
    out.print(table)
    for side in SIDES:
        if side not in done:
            out.print(f"Left out: {side} (not installed, or a Java without its compiler)")
    if wrong:
        out.print("Wrong totals:", *wrong, sep="\n  ", markup=False)
    else:
        counted = sum(run.events for runs in done.values() for run in runs)
        out.print(
            f"All totals right: {counted:,} events and more, by client, window and SKU, to the micro-credit."
        )


def _cython() -> bool:
    """Whether the built streams of Faust are there; it takes them by itself then."""
    return find_spec("faust._cython.streams") is not None


if __name__ == "__main__":
    typer.run(bench)
