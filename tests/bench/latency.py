"""`make bench-latency`: from publish until the event can be read in the ledger, at a steady rate.

One local stack, one metering worker as it is shipped (windows of an hour, the default flush interval),
several rounds. Events come in an open loop: each is due at its moment, whatever happened to those before, and
its time counts from then. It is visible when the ledger's answer holds it; the ledger is asked again 10 ms
after the answer before: by so much, and by what a question takes, the figures are too high. Publisher, asker,
broker, ClickHouse and worker share the machine. The first seconds of a round are not counted.
"""

from __future__ import annotations

import signal
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from confluent_kafka import Producer
from tests.bench.measured import START_TIMEOUT_S, is_ready, started, worker_command
from tests.bench.workload import PARTITIONS, make_workload
from tests.stacks import running_stack

from meterline.contracts.topics import USAGE_EVENTS
from meterline.ledger.client import connect
from meterline.local.ports import Ports
from meterline.settings import ClickHouseSettings, Settings

TARGET_MS = 300.0
WARM_UP_S = 5.0
BEAT_S = 0.002
ASK_INTERVAL_S = 0.010
VISIBLE_WITHIN_S = 30.0
COUNT = "SELECT count() FROM events"
"""Costs 2 ms of CPU time: it tells that something is new, and the question below what."""
VISIBLE = """
SELECT partition, max(offset), toUnixTimestamp64Milli(max(appended_at))
FROM events WHERE appended_at >= fromUnixTimestamp64Milli(%(since)s, 'UTC') GROUP BY partition
SETTINGS max_threads = 1
"""
"""Parts that end before are left out unread. A question that reads all of them costs 70 ms of CPU time, which
it takes from those it observes."""

Seen = dict[int, list[tuple[int, float]]]
"""By partition: newest offset of an answer, and when it came. Both rise."""


class Asker(threading.Thread):
    """Asks the ledger how far it is, again and again.

    How many rows there are costs little to ask, how far each partition is much more, which is taken from
    those who are observed. So that is asked when there are more rows. Are there still as many after the
    answer, then all it says was there when they were first counted.
    """

    def __init__(self, settings: ClickHouseSettings) -> None:
        super().__init__(daemon=True)
        self.seen: Seen = defaultdict(list)
        self.enough = threading.Event()
        self._client = connect(settings)

    def run(self) -> None:
        newest: dict[int, int] = {}
        known = 0
        while not self.enough.wait(ASK_INTERVAL_S):
            rows, counted_at = self._count()
            while rows != known:
                # In a partition append times never fall: what wasn't seen yet is no older than what was.
                since = min(newest.values()) if len(newest) == PARTITIONS else 0
                answer = self._client.execute(VISIBLE, {"since": since})
                answered_at = time.monotonic()
                known = rows
                rows, again_at = self._count()
                for partition, offset, appended_at in answer:
                    self.seen[partition].append((offset, counted_at if rows == known else answered_at))
                    newest[partition] = appended_at
                counted_at = again_at
        self._client.disconnect()

    def _count(self) -> tuple[int, float]:
        """Rows of the ledger, and when the answer came."""
        ((rows,),) = self._client.execute(COUNT)
        return rows, time.monotonic()


def publish(bootstrap: str, events: int, per_s: int, seed: int) -> dict[tuple[int, int], float]:
    """Send events at their moments; where each stands in the log, and when it was due."""
    messages = make_workload(events, time.time_ns() // 1_000_000, seed).messages
    producer = Producer(
        {"bootstrap.servers": bootstrap, "partitioner": "murmur2", "enable.idempotence": True, "linger.ms": 5}
    )
    due_at: dict[tuple[int, int], float] = {}
    begun = time.monotonic()
    sent = 0
    while sent < events:
        due = min(events, int((time.monotonic() - begun) * per_s))
        for number in range(sent, due):
            client, value, _, _ = messages[number]
            at = begun + number / per_s

            def acknowledged(error: object, message: object, at: float = at) -> None:
                assert error is None, error
                due_at[message.partition(), message.offset()] = at

            producer.produce(USAGE_EVENTS, value, client, on_delivery=acknowledged)
        sent = due
        producer.poll(BEAT_S)
    producer.flush(VISIBLE_WITHIN_S)
    return {place: at for place, at in due_at.items() if at - begun >= WARM_UP_S}


def latencies(due_at: dict[tuple[int, int], float], asker: Asker) -> list[float]:
    """Seconds from due to visible, sorted; waits until all of them are.

    Raises:
        TimeoutError: some never become visible.
    """
    last: dict[int, int] = {}
    for partition, offset in due_at:
        last[partition] = max(offset, last.get(partition, -1))
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while any(not asker.seen[p] or asker.seen[p][-1][0] < offset for p, offset in last.items()):
        if time.monotonic() > deadline:
            raise TimeoutError("events that were published are not in the ledger")
        time.sleep(0.1)
    asker.enough.set()
    asker.join()
    for answers in asker.seen.values():
        assert all(before <= after for before, after in pairwise(answers))
    return sorted(
        asker.seen[partition][bisect_left(asker.seen[partition], (offset, 0.0))][1] - at
        for (partition, offset), at in due_at.items()
    )


def bench(
    per_s: Annotated[int, typer.Option(min=10, help="Events a second.")] = 5_000,
    seconds: Annotated[int, typer.Option(min=6, max=240, help="Of a round, warm-up included.")] = 25,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="One after the other.")] = 3,
) -> None:
    """Publish to ledger-visible: median, p99 and the longest, of each round and the medians of all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (
        tempfile.TemporaryDirectory(prefix="meterline-bench-") as directory,
        running_stack("local") as stack,
    ):
        environment = stack.process_environment() | {
            "METERLINE_WORKER__DATA_DIR": str(Path(directory) / "worker"),
        }
        web_port = Ports.free().stripe
        with started(worker_command(web_port), environment, Path(directory) / "worker.log") as worker:
            worker.wait(lambda: int(is_ready(web_port)), 1, START_TIMEOUT_S)
            measured = [_round(stack.settings, per_s, seconds, number) for number in range(rounds)]
    p50, p99, longest = (statistics.median(values) for values in zip(*measured, strict=True))
    typer.echo(
        f"Medians of {rounds} round(s), {per_s:,} events/s: visible in the ledger after {p50:.0f} ms "
        f"(median), {p99:.0f} ms (p99, the target is < {TARGET_MS:g}), {longest:.0f} ms (longest)"
    )


def _round(settings: Settings, per_s: int, seconds: int, number: int) -> tuple[float, float, float]:
    """Median, p99 and the longest (ms)."""
    asker = Asker(settings.clickhouse)
    asker.start()
    taken = latencies(publish(settings.kafka.bootstrap_servers, per_s * seconds, per_s, number), asker)
    p50, p99 = (taken[int(len(taken) * share)] * 1000 for share in (0.5, 0.99))
    longest = taken[-1] * 1000
    typer.echo(
        f"{len(taken):,} events: {p50:.0f} ms (median), {p99:.0f} ms (p99), {longest:.0f} ms (longest)"
    )
    return p50, p99, longest


if __name__ == "__main__":
    typer.run(bench)
