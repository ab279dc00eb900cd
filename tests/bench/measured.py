"""The two processes under test: started, told apart from their start-up, measured, stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from prometheus_client.parser import text_string_to_metric_families
from tests.bench.workload import PARTITIONS, WARM_UP_EVENTS, WINDOW_LENGTH_MS, Workload

from meterline.contracts.topics import USAGE_EVENTS
from meterline.local.ports import HOST

START_TIMEOUT_S = 180.0
"""The first start after a change compiles the kernels."""
RUN_TIMEOUT_S = 300.0
READY_POLL_INTERVAL_S = 0.02
"""The clock starts at most so long after the worker has its partitions."""
POLL_INTERVAL_S = 0.1
"""An event's fate is looked up this often: at most so much idle time is counted."""
OUR_POLL_INTERVAL_S = 0.5
"""The same where the process itself is asked: its answer takes milliseconds of what is measured."""
STOP_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 20


class BenchError(Exception):
    """The measurement could not be made."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one process.

    Attributes:
        events: how many were counted between the two looks at the clock.
        cpu_s: user and system time of the process, all its threads.
        wall_s: between the same two looks.
        memory_mib: the most the process ever had in memory, start-up included.
    """

    events: int
    cpu_s: float
    wall_s: float
    memory_mib: float

    @property
    def cpu_s_per_million(self) -> float:
        return self.cpu_s / self.events * 1_000_000

    @property
    def events_per_s(self) -> float:
        return self.events / self.wall_s


class Worker:
    """A started process and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log_file: Path) -> None:
        self._process = process
        self._log_file = log_file

    def cpu_s(self) -> float:
        """User and system time so far, all threads."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def memory_mib(self) -> float:
        """The most it ever had in memory (Linux; elsewhere what it has now)."""
        status = Path(f"/proc/{self._process.pid}/status")
        if status.exists():
            peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(peak.split()[1]) / 1024
        return psutil.Process(self._process.pid).memory_info().rss / 2**20

    def wait(
        self,
        accounted: Callable[[], int],
        wanted: int,
        timeout_s: float,
        poll_interval_s: float = POLL_INTERVAL_S,
    ) -> None:
        """Until so many events are accounted for.

        Raises:
            BenchError: the process ended, or takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while (seen := accounted()) < wanted:
            self.require_running()
            if time.monotonic() > deadline:
                raise BenchError(f"{seen} of {wanted} events after {timeout_s:.0f} s. {self._tail()}")
            time.sleep(poll_interval_s)

    def require_running(self) -> None:
        """Notice at once that a process is gone.

        Raises:
            BenchError: it ended.
        """
        if self._process.poll() is not None:
            raise BenchError(f"a worker ended. {self._tail()}")

    def _tail(self) -> str:
        lines = self._log_file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "Its log says:\n" + "\n".join(f"  {line}" for line in lines)


def measure_ours(
    work: Workload,
    bootstrap: str,
    environment: Mapping[str, str],
    web_ports: Sequence[int],
    log_file: Path,
) -> Measurement:
    """Run metering workers, one for each web port, through a backlog until every event is committed.

    The clock starts when each worker has its partitions: of one, right before the first record is read.
    Where there are more, the first ones have begun by then; what they have done is not counted.
    """
    work.publish(bench_producer(bootstrap), USAGE_EVENTS, slice(None))
    with ExitStack() as running:
        workers = [
            running.enter_context(
                started(worker_command(port), environment, log_file.with_stem(f"{log_file.stem}-{number}"))
            )
            for number, port in enumerate(web_ports)
        ]
        first, wanted = workers[0], len(work.messages)

        def of_all(count: Callable[[int], int]) -> int:
            for worker in workers:
                worker.require_running()
            return sum(map(count, web_ports))

        counted = partial(of_all, _events_of_worker)
        first.wait(partial(of_all, is_ready), len(workers), START_TIMEOUT_S, READY_POLL_INTERVAL_S)
        clock, cpu_s = time.monotonic(), _cpu_s(workers)
        before = counted() if len(workers) > 1 else 0
        first.wait(counted, wanted, RUN_TIMEOUT_S, OUR_POLL_INTERVAL_S)
        used_s, wall_s = _cpu_s(workers) - cpu_s, time.monotonic() - clock
        return Measurement(wanted - before, used_s, wall_s, sum(one.memory_mib() for one in workers))


def _cpu_s(workers: Sequence[Worker]) -> float:
    return sum(worker.cpu_s() for worker in workers)


def worker_command(web_port: int) -> list[str]:
    """What starts a metering worker."""
    meterline = Path(sys.executable).with_name("meterline")
    return [str(meterline), "worker", "metering", "--web-port", str(web_port)]


def measure_stock(work: Workload, bootstrap: str, name: str, log_file: Path) -> Measurement:
    """Run the stock idiom through the events, until the changelog has the last change."""
    changelog = stock_changelog(name)
    create_topics(bootstrap, name, changelog)
    command = [
        sys.executable,
        str(Path(__file__).with_name("stock_faust.py")),
        "worker",
        "-l",
        "warn",
        "--without-web",
    ]
    environment = {
        "BENCH_STOCK_NAME": name,
        "BENCH_STOCK_BROKER": bootstrap,
        "BENCH_STOCK_PARTITIONS": str(PARTITIONS),
        "BENCH_STOCK_WINDOW_S": str(WINDOW_LENGTH_MS / 1000),
        "BENCH_STOCK_DATA_DIR": str(log_file.parent / name),
    }
    watcher = Consumer({"bootstrap.servers": bootstrap, "group.id": f"{name}-watcher"})
    try:
        with started(command, environment, log_file) as worker:
            return measure_after_warm_up(worker, work, bootstrap, name, lambda: _records(watcher, changelog))
    finally:
        watcher.close()


def stock_changelog(name: str) -> str:
    """The topic of the stock worker's table, as Faust names it."""
    return f"{name}-totals-changelog"


def measure_after_warm_up(
    worker: Worker,
    work: Workload,
    bootstrap: str,
    topic: str,
    accounted: Callable[[], int],
    *,
    key_has_sku: bool = False,
) -> Measurement:
    """Publish a few events, and when they are counted the others: only these are measured."""
    producer = bench_producer(bootstrap)
    work.publish(producer, topic, slice(0, WARM_UP_EVENTS), key_has_sku=key_has_sku)
    worker.wait(accounted, WARM_UP_EVENTS, START_TIMEOUT_S)
    clock, cpu_s = time.monotonic(), worker.cpu_s()
    work.publish(producer, topic, slice(WARM_UP_EVENTS, None), key_has_sku=key_has_sku)
    worker.wait(accounted, len(work.messages), RUN_TIMEOUT_S)
    counted = len(work.messages) - WARM_UP_EVENTS
    return Measurement(counted, worker.cpu_s() - cpu_s, time.monotonic() - clock, worker.memory_mib())


def bench_producer(bootstrap: str) -> Producer:
    """What publishes the events of every side."""
    return Producer(
        {
            "bootstrap.servers": bootstrap,
            "partitioner": "murmur2",
            "enable.idempotence": True,
            "linger.ms": 20,
            "batch.size": 262_144,
            "queue.buffering.max.messages": 1_000_000,
            "log_level": 0,
        }
    )


def is_ready(web_port: int) -> bool:
    """Whether a worker has its partitions."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{web_port}/healthz/ready", timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _events_of_worker(web_port: int) -> int:
    """Accepted, duplicate or dead: every event that a committed flush accounts for."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{web_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise BenchError(f"the worker's metrics page answers {error.code}") from error
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0  # not listening yet; a worker that ended is noticed by its process
    return sum(events_by_disposition(text).values())


def events_by_disposition(metrics_page: str) -> Counter[str]:
    """Accepted, duplicate or dead: every event that a committed flush accounts for."""
    return Counter(
        {
            sample.labels["disposition"]: int(sample.value)
            for family in text_string_to_metric_families(metrics_page)
            for sample in family.samples
            if sample.name == "meterline_events_total"
            and sample.labels["disposition"] in {"accepted", "duplicate", "dead_letter"}
        }
    )


def _records(watcher: Consumer, topic: str) -> int:
    """Records in a topic: one for each change of the stock table, so one for each event."""
    partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    ranges = [watcher.get_watermark_offsets(partition, timeout=10) for partition in partitions]
    return sum(end - start for start, end in ranges)


def create_topics(bootstrap: str, source: str, changelog: str) -> None:
    """The source keeps the producer's time stamps: the stock window takes its time from them."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    topics = [
        NewTopic(source, PARTITIONS, 1, config={"message.timestamp.type": "CreateTime"}),
        NewTopic(changelog, PARTITIONS, 1, config={"cleanup.policy": "compact"}),
    ]
    for created in admin.create_topics(topics).values():
        created.result(30)


@contextmanager
def started(command: list[str], environment: Mapping[str, str], log_file: Path) -> Iterator[Worker]:
    """A process of its own session, so that a Ctrl-C is ours to handle; always stopped."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        yield Worker(process, log_file)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
