"""`make bench-recovery`: what it costs a metering worker to take over partitions with a large state.

One local stack. A worker with nothing to restore is measured first: the control, its start-up is in both
figures. Then a day's state is written (`old_state.py`): a million windows and ten million ids in the dedupe
index, over four partitions, and the same worker starts again, all caches of the system warm. Its clock runs
from the start of the process until its health page says that all four are restored; that includes reading the
changelog, rebuilding the index from the ledger, and comparing every kept window with the ledger's rows.

Then the restored worker must go on rightly: copies of old events of all ages are duplicates, new events of
windows published and open are added to the sums that were there. What is expected is reckoned from the
generator's formula, what is found is read from the changelog and from the ledger's raw rows.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tests.bench.measured import Worker, bench_producer, events_by_disposition
from tests.bench.old_state import (
    CHANGELOG,
    HOURS,
    KEPT,
    PARTITIONS,
    SETTINGS,
    SKU,
    OldState,
    old_state,
    write,
)
from tests.bench.report import conclude
from tests.stacks import RunningStack, running_stack
from tests.worker_processes import ALL, WorkerProcess, ended_in_the_end, until

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_to_record
from meterline.contracts.topics import USAGE_EVENTS
from meterline.domain.events import UsageEvent
from meterline.domain.windows import SkuTotal
from meterline.ledger.client import connect
from meterline.metering.state import (
    aggregate_key,
    parse_aggregate_value,
    parse_total_value,
    total_key,
)
from meterline.streaming.changelog import read_changelog

TARGET_S = 30.0
READY_S_MAX = 600.0
NEW_CREDITS_MICRO = 3_000_000
TOUCHED_HOURS = (HOURS - 1, HOURS - KEPT)
"""The newest window, which is open, and the oldest that is kept, whose snapshot is published."""
TOUCHED_CLIENTS = range(20)

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Start:
    """A worker that was started, at the moment it was ready."""

    seconds: float
    cpu_s: float
    memory_mib: float
    """The most it ever had."""


def _start(worker: WorkerProcess) -> Start:
    clock = time.monotonic()
    worker.start()

    def has_all() -> bool:
        is_ready = worker.is_ready() and worker.partitions() == ALL
        assert "partition halted" not in worker.log_file.read_text(), worker.log_tail()
        return is_ready

    until(has_all, "partitions are restored", READY_S_MAX)
    seconds = time.monotonic() - clock
    looked_at = Worker(worker.process, worker.log_file)
    return Start(round(seconds, 2), round(looked_at.cpu_s(), 2), round(looked_at.memory_mib()))


def _go_on(old: OldState, stack: RunningStack, worker: WorkerProcess) -> list[str]:
    """Send copies and new events; what is wrong afterwards."""
    codec = RecordCodec("usage-event")
    producer = bench_producer(stack.settings.kafka.bootstrap_servers)
    copies = new = 0
    for partition in range(PARTITIONS):
        events = [old.sample(partition, offset) for offset in range(0, old.ids, old.sample_step)]
        copies += len(events)
        for hour in TOUCHED_HOURS:
            for client in TOUCHED_CLIENTS:
                name, at = old.client(partition, client), old.window_start(hour) + 1
                events.append(UsageEvent(f"new-{hour}-{client}", name, "task", SKU, NEW_CREDITS_MICRO, at))
                new += 1
        for sent in events:
            value = codec.encode(event_to_record(sent))
            producer.produce(USAGE_EVENTS, value, sent.client_id.encode(), partition=partition)
    producer.flush(60)

    def found() -> Counter[str]:
        return events_by_disposition(worker.get("/metrics")[1])

    until(lambda: found().total() >= copies + new, "all events are accounted for")
    wrong = []
    if found() != Counter(duplicate=copies, accepted=new):
        wrong.append(f"{dict(found())} of {copies} copies and {new} new events")
    wrong += _wrong_in_ledger(old, stack, new)
    for partition in range(PARTITIONS):
        wrong += _wrong_in_state(old, stack, partition)
    return wrong


def _wrong_in_ledger(old: OldState, stack: RunningStack, new: int) -> list[str]:
    client = connect(stack.settings.clickhouse)
    try:
        ((rows, credits_micro),) = client.execute("SELECT count(), sum(credits_micro) FROM events FINAL")
    finally:
        client.disconnect()
    before = PARTITIONS * (old.ids * 1_000_000 + sum(offset % 7 for offset in range(old.ids)))
    expected = PARTITIONS * old.ids + new, before + new * NEW_CREDITS_MICRO
    found = rows, credits_micro
    return [] if found == expected else [f"ledger: {found} instead of {expected}"]


def _wrong_in_state(old: OldState, stack: RunningStack, partition: int) -> list[str]:
    state = read_changelog(stack.settings.kafka, CHANGELOG, partition)
    wrong = []

    def compare(what: str, found: SkuTotal, before: SkuTotal, new: int) -> None:
        expected = SkuTotal(before.count + new, before.credits_micro + new * NEW_CREDITS_MICRO)
        if found != expected:
            wrong.append(f"{what}: {found} instead of {expected}")

    for number in TOUCHED_CLIENTS:
        name = old.client(partition, number)
        for hour in range(HOURS - KEPT, HOURS):
            value = state[aggregate_key(partition, old.window_start(hour), name, SKU)]
            new = int(hour in TOUCHED_HOURS)
            compare(f"{name}, hour {hour}", parse_aggregate_value(value), old.window_sum(hour, number), new)
        total, _ = parse_total_value(state[total_key(partition, name)])
        compare(f"{name}, in all", total, old.lifetime_sum(number), len(TOUCHED_HOURS))
    return wrong


def _measure(windows: int, ids: int, directory: Path, status: Any) -> dict[str, Any]:
    with running_stack("local") as stack:
        environment = {**stack.process_environment(), **SETTINGS}
        environment["METERLINE_WORKER__DATA_DIR"] = str(directory / "worker")
        first, worker = (WorkerProcess("metering", environment, directory) for _ in range(2))
        with ended_in_the_end(first, worker):
            status.update("a worker with nothing to restore")
            control = _start(first)
            first.terminate()
            old = old_state(windows, ids)
            status.update(f"writing {windows:,} windows and {ids:,} events")
            clock = time.monotonic()
            asyncio.run(write(old, stack.settings))
            prepared_s = time.monotonic() - clock
            status.update("a worker takes all over")
            restored = _start(worker)
            status.update("copies and new events")
            wrong = _go_on(old, stack, worker)
            worker.terminate()
    return {
        "windows": old.clients * KEPT * PARTITIONS,
        "ids": old.ids * PARTITIONS,
        "prepared_s": round(prepared_s, 1),
        "control": asdict(control),
        "restored": asdict(restored),
        "wrong": wrong,
    }


def _show(report: dict[str, Any]) -> None:
    table = Table(
        title=f"A worker takes over {report['windows']:,} windows and {report['ids']:,} ids",
        caption="From the start of its process until it is ready.",
    )
    for heading in ("", "seconds", "target", "CPU s", "most memory MiB"):
        table.add_column(heading, justify="right")
    for title, name in (("nothing to restore", "control"), ("all of it", "restored")):
        start = report[name]
        target = f"< {TARGET_S:g}" if name == "restored" else ""
        table.add_row(title, f"{start['seconds']}", target, f"{start['cpu_s']}", f"{start['memory_mib']:,}")
    out = Console()
    out.print(table)
    if report["wrong"]:
        out.print("Wrong:", *report["wrong"], sep="\n  ", markup=False)
    else:
        out.print(
            "All right: old events' copies are duplicates, windows and totals go on from what they were."
        )


def bench(
    windows: Annotated[int, typer.Option(min=1_000, help="Window states, over all partitions.")] = 1_000_000,
    ids: Annotated[int, typer.Option(min=10_000, help="Ids in the dedupe index.")] = 10_000_000,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Seconds, CPU time and memory of taking over partitions with a large state."""
    if ids < windows * HOURS / KEPT:
        raise typer.BadParameter(f"each window has an event: at least {windows * HOURS // KEPT:,} ids")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything started is stopped, as on Ctrl-C
    with (
        tempfile.TemporaryDirectory(prefix="meterline-bench-") as directory,
        console.status("starting Kafka and ClickHouse") as status,
    ):
        report = _measure(windows, ids, Path(directory), status)
    seconds = report["restored"]["seconds"]
    missed = [] if seconds < TARGET_S else [f"ready after {seconds} s, the target is {TARGET_S:g}"]
    conclude(report, missed, _show, as_json=as_json)


if __name__ == "__main__":
    typer.run(bench)
