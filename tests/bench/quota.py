"""`make bench-quota`: decisions per second of four ways to ask for credits, on one server, in one process.

One Valkey process with its append-only file synced each second, as the local stack runs it, is started for
this. 64 tasks of one process work for one client: each reserves, then settles with a part, and both calls are
counted as decisions. Nothing is left out: in every variant the parts become provisional consumption.

* (a) plain: redis-py, one call of the same script for each decision.
* (b) batched: `CreditBuckets.reserve` and `settle`.
* (c) leased: the same calls, credits taken in portions (`LeasePlan`).
* (d) bulk: `reserve_many` and `settle_many`, 100 reservations a call, leased.

The variants alternate; what is compared is the median of the rounds. Each run ends with its budget cut to a
little more than was used, and goes on until every task was refused. Then its books must balance: no more was
reserved than there was, and the bucket says exactly what the tasks counted. The most that was ever set aside
is read from the bucket all through the leased runs: it must stay below 1 % of the budget.

Latency is that of one call, in (d) of one bulk call. For (b) it is measured once more in an open loop: calls
come at a share of its median's rate, whatever happened to those before, and their time counts from the moment
they were due. Beside it runs a control: the same loop, calls and answers, but the server's script looks at no
bucket and decides nothing. What the control takes, no script could save: it is the price of this process'
event loop, the client library, the kernel and the machine. The loop that makes the calls fills a core.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table
from tests.bench.report import conclude
from tests.valkey import TOPIC_ID, open_buckets, scripts_of, valkey

from meterline.quota import CreditBuckets, CreditsExhausted, LeasePlan, Part
from meterline.quota.keys import Keys, shard_of
from meterline.quota.scripts import rendered

M = 1_000_000
CLIENT = "hot-client"
TASKS = 64
BULK = 100
BUDGET = 100_000_000
"""Credits, one for each reservation: more than any run uses in its time."""
LEFT_AT_THE_END = {"plain": 500, "batched": 2_000, "leased": 10_000, "bulk": 50_000}
"""Credits that are left when the budget is cut: every task is refused a moment later."""
SHARE_MAX = 0.01
WARM_UP_S = 0.5
"""Before each run, for every variant: connections are made, leases are taken and grow."""
PROCESSES = 4
TIMEOUT_MS = 5_000
"""A busy machine shall show in the rates, not in refusals."""

TARGETS = {"batched": 5.0, "leased": 15.0, "bulk": 80.0}
P99_MS_MAX = 1.0
"""At half of the peak."""
OPEN_LOOP_SHARES = (0.5, 0.25, 0.125)
"""Of (b)'s peak."""
DECIDES_NOTHING = """
local flat, answers, at = cjson.decode(ARGV[4]), {}, 1
local granted = string.format('g %d 1', redis.call('TIME')[1] * 1000 + 60000)
while at <= #flat do
  if flat[at] == 'r' then
    answers[#answers + 1], at = granted, at + 4
  else
    answers[#answers + 1], at = 'ok', at + 4 + 3 * flat[at + 3]
  end
end
return answers
"""
"""The control's script. A reserve has 4 values, a settle 4 and 3 a part; answers like those of bucket.lua."""

console = Console(stderr=True)


@dataclass
class Run:
    """What the tasks of one run counted themselves."""

    name: str
    seconds: float
    decisions: int = 0
    reserved: int = 0
    settled: int = 0
    refused: int = 0
    latencies: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    set_aside_max: int = 0
    is_over: bool = False
    wrong: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.decisions / self.elapsed

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[int(share * (len(ordered) - 1))] * 1_000


def _settle_memory() -> None:
    """What is there stays: no variant pays for looking through it (50 ms), or for what the last one left."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


Ask = Callable[[object, "Run", "count[int]"], Awaitable[bool]]
"""One turn of a task: reserve and settle; False: refused."""


def _part(offsets: count[int]) -> Part:
    return Part(TOPIC_ID, 0, next(offsets), M)


@asynccontextmanager
async def plain(url: str, namespace: str) -> AsyncIterator[Ask]:
    """redis-py as its own pages show it."""
    keys = Keys(namespace)
    async with Redis.from_url(url, max_connections=TASKS) as client:
        run_id = (await client.info("server"))["run_id"]
        script = client.register_script(rendered("bucket", run_id))
        of_client = keys.of_bucket_script(CLIENT)
        prefix = keys.provisional_prefix(shard_of(CLIENT))

        async def ask(name: object, run: Run, offsets: count[int]) -> bool:
            rid = f"task/{name}"
            started = time.perf_counter()
            (answer,) = await script(keys=of_client, args=[CLIENT, prefix, "", f'["r","{rid}",{M},60000]'])
            between = time.perf_counter()
            run.latencies.append(between - started)
            if not answer.startswith(b"g"):
                return False
            run.reserved += 1
            settle = f'["s","{rid}",1,1,1,{next(offsets)},{M}]'
            await script(keys=of_client, args=[CLIENT, prefix, f"{TOPIC_ID}:0", settle])
            run.latencies.append(time.perf_counter() - between)
            run.settled += 1
            return True

        yield ask


@asynccontextmanager
async def batched(url: str, namespace: str, plan: LeasePlan | None = None) -> AsyncIterator[Ask]:
    """Single calls; with a plan, leased."""
    connecting = CreditBuckets.connect(url, namespace=namespace, timeout_ms=TIMEOUT_MS, leases=plan)
    async with connecting as buckets:

        async def ask(name: object, run: Run, offsets: count[int]) -> bool:
            rid = f"task/{name}"
            started = time.perf_counter()
            try:
                await buckets.reserve(CLIENT, 1, reservation_id=rid)
            except CreditsExhausted:
                return False
            between = time.perf_counter()
            run.reserved += 1
            await buckets.settle(rid, (_part(offsets),))
            run.latencies.append(between - started)
            run.latencies.append(time.perf_counter() - between)
            run.settled += 1
            return True

        yield ask


@asynccontextmanager
async def bulk(url: str, namespace: str, plan: LeasePlan) -> AsyncIterator[Ask]:
    """Bulk calls."""
    connecting = CreditBuckets.connect(url, namespace=namespace, timeout_ms=TIMEOUT_MS, leases=plan)
    async with connecting as buckets:

        async def ask(name: object, run: Run, offsets: count[int]) -> bool:
            wanted = {f"task/{name}/{i}": 1 for i in range(BULK)}
            started = time.perf_counter()
            refused = await buckets.reserve_many(CLIENT, wanted)
            between = time.perf_counter()
            made = {rid: (_part(offsets),) for rid in wanted if rid not in refused}
            run.reserved += len(made)
            again = time.perf_counter()
            await buckets.settle_many(CLIENT, made)
            run.latencies.append(between - started)
            run.latencies.append(time.perf_counter() - again)
            run.settled += len(made)
            return len(made) == BULK

        yield ask


def _variant(name: str, url: str, namespace: str, processes: int) -> Any:
    plan = LeasePlan(share_max=SHARE_MAX / processes)
    match name:
        case "plain":
            return plain(url, namespace)
        case "batched":
            return batched(url, namespace)
        case "leased":
            return batched(url, namespace, plan)
        case _:
            return bulk(url, namespace, plan)


async def _work(run: Run, ask: Ask, names: count[int], offsets: count[int], *, per_turn: int) -> None:
    """64 tasks: a warm-up, the time of the run, and then until each was refused."""

    async def timed(deadline: float) -> None:
        while time.perf_counter() < deadline:
            if not await ask(next(names), run, offsets):
                run.wrong.append("refused before the budget was cut")
                return
            run.decisions += per_turn

    async def to_the_end() -> None:
        while await ask(next(names), run, offsets):
            pass
        run.refused += 1

    started = time.perf_counter()
    await asyncio.gather(*(timed(started + WARM_UP_S) for _ in range(TASKS)))
    run.decisions, run.latencies = 0, []
    started = time.perf_counter()
    await asyncio.gather(*(timed(started + run.seconds) for _ in range(TASKS)))
    run.elapsed = time.perf_counter() - started
    latencies, run.latencies = run.latencies, []
    await _cut_budget(run)
    await asyncio.gather(*(to_the_end() for _ in range(TASKS)))
    run.latencies = latencies


_places: dict[str, Any] = {}
_cuts = count()


async def _cut_budget(run: Run) -> None:
    """Again until it is so: a lease may take credits between the look and the cut."""
    scripts = _places["scripts"]
    left = LEFT_AT_THE_END[run.name] * M
    while (available := int((await scripts.run_ops(CLIENT, [["b"]]))[0].split()[4])) != left:
        await scripts.run_ops(CLIENT, [["G", f"cut/{available}/{next(_cuts)}", left - available]])


async def _watch(run: Run) -> None:
    """The most that is set aside at any moment we look."""
    while True:
        (answer,) = await _places["scripts"].run_ops(CLIENT, [["b"]])
        if not run.is_over:
            run.set_aside_max = max(run.set_aside_max, int(answer.split()[3]))
        await asyncio.sleep(0.02)


async def measure(name: str, url: str, seconds: float, number: int) -> Run:
    """One run of one variant, its books checked."""
    namespace = f"{name}-{number}"
    async with Redis.from_url(url) as admin:
        await admin.flushall()
    await open_buckets(url, namespace, [(CLIENT, BUDGET * M)])
    scripts = await scripts_of(url, namespace)
    _places["scripts"] = scripts
    run = Run(name, seconds)
    _settle_memory()
    async with _variant(name, url, namespace, 1) as ask:
        watching = asyncio.create_task(_watch(run)) if name in {"leased", "bulk"} else None
        await _work(run, ask, count(), count(), per_turn=2 * BULK if name == "bulk" else 2)
        if watching is not None:
            watching.cancel()
    (answer,) = await scripts.run_ops(CLIENT, [["b"]])
    await scripts.client.aclose()
    granted, consumed, provisional, reserved, available = (int(part) for part in answer.split()[:5])
    expected = (0, run.settled * M, 0, granted - run.settled * M)
    if (consumed, provisional, reserved, available) != expected:
        run.wrong.append(f"the bucket says {answer}, the tasks settled {run.settled} credits")
    if run.reserved * M > granted:
        run.wrong.append(f"oversold: {run.reserved} credits reserved of {granted // M}")
    if run.refused != TASKS:
        run.wrong.append(f"{run.refused} tasks were refused at the end")
    if run.set_aside_max > SHARE_MAX * BUDGET * M:
        run.wrong.append(
            f"{run.set_aside_max / M} credits were set aside, more than {SHARE_MAX:.0%} of the budget"
        )
    return run


async def control_loop(url: str, calls_per_s: float, seconds: float) -> Run:
    """`open_loop` with a server that decides nothing."""
    with patch("meterline.quota.server.rendered", lambda _, run_id: f"-- {run_id}{DECIDES_NOTHING}"):
        return await open_loop(url, calls_per_s, seconds)


async def open_loop(url: str, calls_per_s: float, seconds: float) -> Run:
    """(b) with calls that come whether or not earlier ones are done. The loop spins: they come in time."""
    async with Redis.from_url(url) as admin:
        await admin.flushall()
    await open_buckets(url, "open-loop", [(CLIENT, BUDGET * M)])
    run = Run("open loop", seconds)
    offsets = count()

    async def pair(buckets: CreditBuckets, number: int, due: float) -> None:
        await buckets.reserve(CLIENT, 1, reservation_id=f"task/{number}")
        between = time.perf_counter()
        run.latencies.append(between - due)
        await buckets.settle(f"task/{number}", (_part(offsets),))
        run.latencies.append(time.perf_counter() - between)

    _settle_memory()
    async with CreditBuckets.connect(url, namespace="open-loop", timeout_ms=TIMEOUT_MS) as buckets:
        started = time.perf_counter()
        interval = 2 / calls_per_s
        under_way: set[asyncio.Task[None]] = set()
        for number in range(int(seconds / interval)):
            due = started + number * interval
            while time.perf_counter() < due:  # noqa: ASYNC110 - a timer would be a millisecond late
                await asyncio.sleep(0)
            task = asyncio.create_task(pair(buckets, number, due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
        run.elapsed = time.perf_counter() - started
    run.decisions = len(run.latencies)
    return run


async def _child(name: str, url: str, namespace: str, seconds: float) -> None:
    """One of several processes: prints its rate."""
    run = Run(name, seconds)
    names = (f"{os.getpid()}/{number}" for number in count())
    offsets = count(os.getpid() * 1_000_000_000)
    async with _variant(name, url, namespace, PROCESSES) as ask:
        deadline = time.perf_counter() + seconds

        async def timed() -> None:
            while time.perf_counter() < deadline and await ask(next(names), run, offsets):
                run.decisions += 2 * BULK if name == "bulk" else 2

        await asyncio.gather(*(timed() for _ in range(TASKS)))
    typer.echo(json.dumps({"rate": run.decisions / seconds, "settled": run.settled}))


async def several_processes(name: str, url: str, seconds: float) -> tuple[float, list[str]]:
    """The sum of their rates, and what was wrong."""
    namespace = f"{name}-together"
    await open_buckets(url, namespace, [(CLIENT, BUDGET * M)])
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.quota", "--child", name, "--url", url,
            "--namespace", namespace, "--seconds", str(seconds), stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(PROCESSES)
    ]  # fmt: skip
    said = [json.loads((await child.communicate())[0]) for child in children]
    scripts = await scripts_of(url, namespace)
    (answer,) = await scripts.run_ops(CLIENT, [["b"]])
    await scripts.client.aclose()
    settled = sum(one["settled"] for one in said)
    _, consumed, provisional, reserved, _ = (int(part) for part in answer.split()[:5])
    wrong = []
    if (consumed, provisional, reserved) != (0, settled * M, 0):
        wrong.append(f"{PROCESSES} processes, {name}: the bucket says {answer}, they settled {settled}")
    return sum(one["rate"] for one in said), wrong


async def _all(url: str, seconds: float, rounds: int) -> dict[str, Any]:
    names = ("plain", "batched", "leased", "bulk")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            console.print(f"round {number + 1} of {rounds}: {name}", style="dim")
            runs[name].append(await measure(name, url, seconds, number))
    wrong = [f"{run.name}: {one}" for of_name in runs.values() for run in of_name for one in run.wrong]
    medians = {name: statistics.median(run.rate for run in of_name) for name, of_name in runs.items()}
    latency = [
        await _latency_at(url, share, medians["batched"], seconds, rounds) for share in OPEN_LOOP_SHARES
    ]
    together = {}
    for name in names[1:]:
        console.print(f"{PROCESSES} processes: {name}", style="dim")
        together[name], found = await several_processes(name, url, seconds)
        wrong += found
    return {
        "decisions_per_s": {name: round(rate) for name, rate in medians.items()},
        "rounds": {name: [round(run.rate) for run in of_name] for name, of_name in runs.items()},
        "p50_ms": _medians(runs, 0.5),
        "p99_ms": _medians(runs, 0.99),
        "ratios": {name: round(medians[name] / medians["plain"], 1) for name in names[1:]},
        "open_loop": latency,
        "set_aside_max_percent": {
            name: round(max(run.set_aside_max for run in runs[name]) / (BUDGET * M) * 100, 3)
            for name in ("leased", "bulk")
        },
        "decisions_checked": sum(run.reserved + run.settled for of_name in runs.values() for run in of_name),
        "four_processes_per_s": {name: round(rate) for name, rate in together.items()},
        "wrong": wrong,
    }


async def _latency_at(url: str, share: float, peak: float, seconds: float, rounds: int) -> dict[str, float]:
    """(b) and the control, in turns, with calls at a share of (b)'s peak. Medians of the rounds."""
    console.print(f"open loop at {share:g} of the peak", style="dim")
    opened, control = [], []
    for _ in range(rounds):
        opened.append(await open_loop(url, share * peak, seconds))
        control.append(await control_loop(url, share * peak, seconds))

    def median_ms(of_loop: list[Run], percentile: float) -> float:
        return round(statistics.median(run.percentile_ms(percentile) for run in of_loop), 3)

    return {
        "share": share,
        "calls_per_s": round(share * peak),
        "reached_per_s": round(statistics.median(run.rate for run in opened)),
        "p50_ms": median_ms(opened, 0.5),
        "p99_ms": median_ms(opened, 0.99),
        "control_p50_ms": median_ms(control, 0.5),
        "control_p99_ms": median_ms(control, 0.99),
    }


def _medians(runs: dict[str, list[Run]], share: float) -> dict[str, float]:
    return {
        name: round(statistics.median(run.percentile_ms(share) for run in of_name), 3)
        for name, of_name in runs.items()
    }


def _missed(report: dict[str, Any]) -> list[str]:
    missed = [
        f"({name}) is {report['ratios'][name]} times (plain); the target is {target:g}"
        for name, target in TARGETS.items()
        if report["ratios"][name] < target
    ]
    at_half = report["open_loop"][0]
    if at_half["p99_ms"] >= P99_MS_MAX:
        missed.append(
            f"p99 at half of its peak is {at_half['p99_ms']} ms, the target {P99_MS_MAX:g}; "
            f"with a server that decides nothing it is {at_half['control_p99_ms']}"
        )
    return missed


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"Decisions per second, {TASKS} tasks, one client; reserve and settle both counted")
    for heading in ("", "decisions/s", "times (a)", "target", "p50 ms", "p99 ms", f"{PROCESSES} processes/s"):
        table.add_column(heading, justify="right")
    titles = {
        "plain": "(a) redis-py", "batched": "(b) batched", "leased": "(c) leased",
        "bulk": f"(d) bulk of {BULK}",
    }  # fmt: skip
    for name, title in titles.items():
        together = report["four_processes_per_s"].get(name)
        table.add_row(
            title,
            f"{report['decisions_per_s'][name]:,}",
            f"{report['ratios'].get(name, 1.0)}",
            f">= {TARGETS[name]:g}" if name in TARGETS else "",
            f"{report['p50_ms'][name]}",
            f"{report['p99_ms'][name]}",
            f"{together:,}" if together else "",
        )
    out = Console()
    out.print(table)
    latency = Table(title=f"(b) in an open loop; at half of its peak the target of p99 is {P99_MS_MAX:g} ms")
    for heading in ("of peak", "calls/s", "reached", "p50 ms", "p99 ms", "control p50", "control p99"):
        latency.add_column(heading, justify="right")
    for at in report["open_loop"]:
        latency.add_row(
            f"{at['share']:.1%}", f"{at['calls_per_s']:,}", f"{at['reached_per_s']:,}", f"{at['p50_ms']}",
            f"{at['p99_ms']}", f"{at['control_p50_ms']}", f"{at['control_p99_ms']}",
        )  # fmt: skip
    out.print(latency)
    out.print("Control: the same calls, and a server that looks at no bucket and decides nothing.")
    aside = report["set_aside_max_percent"]
    out.print(
        f"Most ever set aside: leased {aside['leased']} %, bulk {aside['bulk']} % of the budget (limit 1 %)"
    )
    if report["wrong"]:
        out.print("Wrong:", *report["wrong"], sep="\n  ", markup=False)
    else:
        out.print(
            f"All books right: {report['decisions_checked']:,} decisions, nothing oversold or left over."
        )


def bench(
    seconds: Annotated[float, typer.Option(min=0.2, help="Of each run.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Runs of each; they alternate.")] = 5,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    child: Annotated[str, typer.Option(hidden=True)] = "",
    url: Annotated[str, typer.Option(hidden=True)] = "",
    namespace: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Decisions per second: plain redis-py, batched, leased, bulk."""
    if child:
        asyncio.run(_child(child, url, namespace, seconds))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is stopped, as on Ctrl-C
    with (
        tempfile.TemporaryDirectory(prefix="meterline-bench-") as directory,
        valkey(Path(directory)) as server,
    ):
        report = asyncio.run(_all(server.url, seconds, rounds))
    conclude(report, _missed(report), _show, as_json=as_json)


if __name__ == "__main__":
    typer.run(bench)
