"""`make bench-memory`: whether a metering worker's memory stays flat under steady load.

One local stack, one worker, events at a steady rate for at least six turnovers: spans of one dedupe horizon,
in each of which the index takes in as many ids as it holds. Windows turn over faster still. A share of the
events is sent again within the horizon, so that the index is asked, too.

The worker's resident memory is sampled each second, and its median printed per turnover; beside it, where the
system tells (Linux), what of it is the worker's own and no mapped file: libraries, slices of the index. The
first turnover fills the index and is not judged; flat means that the median of the last turnover is at most
5 % or 10 MiB, whichever is more, above that of the second. In the end every client's credits and count in the
ledger, and the number of duplicates, are compared with the publisher's own.
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table
from tests.bench.measured import bench_producer, events_by_disposition
from tests.bench.report import conclude
from tests.stacks import RunningStack, running_stack
from tests.worker_processes import WorkerProcess, ended_in_the_end, until

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_to_record
from meterline.contracts.topics import USAGE_EVENTS
from meterline.domain.events import UsageEvent
from meterline.ledger.client import connect

TURNOVERS_MIN = 6
SHARE_MAX = 0.05
MIB_MAX = 10.0
CLIENTS = 500
SKUS = 12
RESENDS_EVERY = 200
SAMPLE_S = 1.0
TICK_S = 0.05
SETTINGS = {
    "METERLINE_METERING__WINDOW_LENGTH_MS": "10000",
    "METERLINE_METERING__ALLOWED_LATENESS_MS": "0",
    "METERLINE_METERING__KEEP_CLOSED_WINDOWS_MS": "20000",
}
"""Windows come and go many times in a turnover."""

console = Console(stderr=True)


class SteadyLoad:
    """Events at a rate, now and then one again, and what they add up to."""

    def __init__(self, bootstrap: str, rate: int) -> None:
        self.sent = self.resent = 0
        self.sums: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._rate = rate
        self._chance = random.Random(1)
        self._codec = RecordCodec("usage-event")
        self._producer = bench_producer(bootstrap)

    def run(self, seconds: float, each_sample: Callable[[float], None]) -> None:
        """Send for so long; tell the time since the start each second."""
        started = time.monotonic()
        sample_at = SAMPLE_S
        while (at := time.monotonic() - started) < seconds:
            while self.sent < at * self._rate:
                self._send_one()
            self._producer.poll(0)
            if at >= sample_at:
                each_sample(at)
                sample_at += SAMPLE_S
            time.sleep(TICK_S)
        if left := self._producer.flush(60):
            raise TimeoutError(f"the broker did not acknowledge {left} events")

    def _send_one(self) -> None:
        chance = self._chance
        event = UsageEvent(
            event_id=f"{chance.getrandbits(128):032x}",
            client_id=f"client-{chance.randrange(CLIENTS):03d}",
            correlation_id="task",
            sku=f"sku-{chance.randrange(SKUS):02d}",
            credits_micro=chance.randrange(1, 5_000_000),
            occurred_at=time.time_ns() // 1_000_000,
            source="bench",
        )
        value, key = self._codec.encode(event_to_record(event)), event.client_id.encode()
        self._producer.produce(USAGE_EVENTS, value, key)
        self.sent += 1
        self.sums[event.client_id] += event.credits_micro
        self.counts[event.client_id] += 1
        if self.sent % RESENDS_EVERY == 0:
            self._producer.produce(USAGE_EVENTS, value, key)
            self.resent += 1


def _wrong(load: SteadyLoad, stack: RunningStack, worker: WorkerProcess) -> list[str]:
    """Waits until the worker has accounted for everything."""

    def found() -> Counter[str]:
        return events_by_disposition(worker.get("/metrics")[1])

    until(lambda: found().total() >= load.sent + load.resent, "all events are accounted for")
    wrong = []
    if found() != Counter(accepted=load.sent, duplicate=load.resent):
        wrong.append(f"{dict(found())} of {load.sent} events and {load.resent} copies")
    client = connect(stack.settings.clickhouse)
    try:
        rows = client.execute("SELECT client_id, sum(credits_micro), count() FROM events FINAL GROUP BY 1")
    finally:
        client.disconnect()
    in_ledger = {name: (credits_micro, count) for name, credits_micro, count in rows}
    sent = {name: (load.sums[name], load.counts[name]) for name in load.sums}
    wrong += [
        f"{name}: {in_ledger.get(name)} instead of {sent.get(name)}"
        for name in sorted(sent.keys() | in_ledger.keys())
        if sent.get(name) != in_ledger.get(name)
    ]
    return wrong


def _measure(minutes: float, horizon_s: int, rate: int, directory: Path, status: Any) -> dict[str, Any]:
    turnovers: dict[int, list[float]] = {}
    own: dict[int, list[float]] = {}
    with running_stack("local") as stack:
        environment = {
            **stack.process_environment(),
            **SETTINGS,
            "METERLINE_METERING__DEDUPE_HORIZON_MS": str(horizon_s * 1_000),
            "METERLINE_WORKER__DATA_DIR": str(directory / "worker"),
        }
        worker = WorkerProcess("metering", environment, directory)
        with ended_in_the_end(worker):
            worker.start_ready()
            process = psutil.Process(worker.process.pid)

            def sample(at: float) -> None:
                memory = process.memory_info()
                mib = memory.rss / 2**20
                turnovers.setdefault(int(at / horizon_s), []).append(mib)
                own_mib = mib - getattr(memory, "shared", 0) / 2**20
                own.setdefault(int(at / horizon_s), []).append(own_mib)
                status.update(f"{at:,.0f} s of {minutes * 60:,.0f}: {mib:,.0f} MiB, {load.sent:,} events")

            load = SteadyLoad(stack.settings.kafka.bootstrap_servers, rate)
            load.run(minutes * 60, sample)
            wrong = _wrong(load, stack, worker)
            times = process.cpu_times()
            cpu_s = times.user + times.system
            worker.terminate()
    whole = range(int(minutes * 60 / horizon_s))
    return {
        "events": load.sent,
        "copies": load.resent,
        "events_per_s": rate,
        "horizon_s": horizon_s,
        "cpu_s": round(cpu_s, 1),
        "turnovers_mib": [
            {
                "median": round(statistics.median(turnovers[number]), 1),
                "own": round(statistics.median(own[number]), 1),
                "most": round(max(turnovers[number]), 1),
            }
            for number in whole
        ],
        "wrong": wrong,
    }


def _missed(report: dict[str, Any]) -> list[str]:
    medians = [turnover["median"] for turnover in report["turnovers_mib"]]
    second, last = medians[1], medians[-1]
    allowed = max(second * SHARE_MAX, MIB_MAX)
    if last - second <= allowed:
        return []
    return [f"the last turnover has {last - second:.1f} MiB more than the second, allowed are {allowed:.1f}"]


def _show(report: dict[str, Any]) -> None:
    table = Table(
        title=f"Resident MiB at {report['events_per_s']:,} events/s, horizon {report['horizon_s']} s",
        caption=f"{report['events']:,} events, {report['copies']:,} copies; CPU {report['cpu_s']} s.",
    )
    for heading in ("turnover", "median", "own", "most"):
        table.add_column(heading, justify="right")
    for number, mib in enumerate(report["turnovers_mib"], start=1):
        table.add_row(str(number), f"{mib['median']}", f"{mib['own']}", f"{mib['most']}")
    out = Console()
    out.print(table)
    if report["wrong"]:
        out.print("Wrong:", *report["wrong"], sep="\n  ", markup=False)
    else:
        out.print("All totals right: every client's credits and count, and every copy a duplicate.")


def bench(
    minutes: Annotated[float, typer.Option(min=6, help="Of load.")] = 30.0,
    horizon_s: Annotated[int, typer.Option(min=60, help="Dedupe horizon, the length of a turnover.")] = 300,
    rate: Annotated[int, typer.Option(min=10, max=5_000, help="Events a second.")] = 2_000,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory of a metering worker under steady load, turnover by turnover."""
    if minutes * 60 < TURNOVERS_MIN * horizon_s:
        raise typer.BadParameter(f"{TURNOVERS_MIN} turnovers take {TURNOVERS_MIN * horizon_s / 60:g} minutes")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything started is stopped, as on Ctrl-C
    with (
        tempfile.TemporaryDirectory(prefix="meterline-bench-") as directory,
        console.status("starting Kafka and ClickHouse") as status,
    ):
        report = _measure(minutes, horizon_s, rate, Path(directory), status)
    conclude(report, _missed(report), _show, as_json=as_json)


if __name__ == "__main__":
    typer.run(bench)
