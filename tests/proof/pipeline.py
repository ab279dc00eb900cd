"""A stack of our own with the workers that quotas need, kept running as an orchestrator would."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient
from redis import Redis
from tests.proof.quota_checker import credits_text
from tests.proof.quota_evidence import Places, read_bucket, tag_of
from tests.stacks import RunningStack, running_stack
from tests.worker_processes import WorkerProcess, ended_in_the_end, until

from meterline.contracts.files import schemas_dir

__all__ = ["Pipeline", "places_of", "running_pipeline", "wait_for"]

WORKER_SETTINGS = {
    "METERLINE_METERING__FLUSH_INTERVAL_MS": "100",
    "METERLINE_METERING__IDLE_AFTER_MS": "500",
    "METERLINE_WORKER__SESSION_TIMEOUT_MS": "6000",
}
LOOK_S = 0.2
OPEN_S_MAX = 90.0
CLI_S_MAX = 240.0


class Pipeline:
    """Kafka, ClickHouse, Redis, a metering worker and a quota worker."""

    def __init__(self, stack: RunningStack, folder: Path, ttl_max_s: float) -> None:
        self.stack, self.folder = stack, folder
        self.environment = (
            stack.process_environment()
            | WORKER_SETTINGS
            | {"METERLINE_QUOTA__RESERVATION_TTL_MAX_S": f"{ttl_max_s}"}
        )
        self.places = places_of(stack)
        self.workers = {kind: WorkerProcess(kind, self.environment, folder) for kind in ("metering", "quota")}
        self.restarts: Counter[str] = Counter()
        """Workers that ended by themselves, e.g. because a service was away, and were started again."""
        self.topic_id = self._topic_id()

    def grant(self, client_id: str, micro: int) -> None:
        """Give credits, as an operator does; returns when they can be used."""
        said = self.cli("grant", client_id, credits_text(micro), "--reason", "proof", "--by", "proof")
        assert said.returncode == 0, said.stdout + said.stderr
        until(lambda: self.granted(client_id) == micro, f"{client_id} has its credits", OPEN_S_MAX)

    def granted(self, client_id: str) -> int:
        """What an open bucket says; -1 while it is closed."""
        with self.redis() as redis:
            if redis.hget(tag_of(self.places.namespace, client_id) + "state", "open") != "1":
                return -1
            return read_bucket(redis, self.places.namespace, client_id).granted

    def redis(self) -> Redis:
        return Redis.from_url(self.places.redis_url, decode_responses=True)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`meterline quota ...`"""
        return subprocess.run(
            [sys.executable, "-m", "meterline", "quota", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=CLI_S_MAX,
            check=False,
        )

    def check(self) -> list[str]:
        """What `meterline quota check` finds; nothing: exit code 0."""
        said = self.cli("check")
        if said.returncode == 0:
            return []
        return [f"meterline quota check ended with {said.returncode}: {(said.stdout + said.stderr)[-1500:]}"]

    def forget_logs(self) -> None:
        """Nobody wants to look at them."""
        shutil.rmtree(self.folder)

    def kill_service(self, name: str) -> None:
        """SIGKILL to a service of the stack."""
        (pid,) = [service.pid for service in self.stack.local.status() if service.name == name]
        os.kill(pid, signal.SIGKILL)

    def start_services(self) -> None:
        """Start those that don't run, on what they had on the disk."""
        self.stack.local.up()

    @contextmanager
    def kept_running(self) -> Iterator[None]:
        """Start the workers; whichever ends is started again."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(LOOK_S):
                for worker in self.workers.values():
                    if worker.process.poll() is not None:
                        self.restarts[worker.kind] += 1
                        worker.start()

        with ended_in_the_end(*self.workers.values()):
            for worker in self.workers.values():
                worker.start()
            for worker in self.workers.values():
                until(worker.is_ready, f"{worker.kind} is ready ({worker.log_tail()})")
            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                yield
            finally:
                stop.set()
                watcher.join()

    def _topic_id(self) -> str:
        admin = AdminClient({"bootstrap.servers": self.places.kafka})
        described = admin.describe_topics(TopicCollection(["usage.events"]))
        return str(described["usage.events"].result(30).topic_id)


@contextmanager
def running_pipeline(ttl_max_s: float) -> Iterator[Pipeline]:
    """All of it, gone afterwards; the logs stay when something is raised."""
    folder = Path(tempfile.mkdtemp(prefix="meterline-proof-"))
    with running_stack("local") as stack:
        pipeline = Pipeline(stack, folder, ttl_max_s)
        with pipeline.kept_running():
            yield pipeline


def places_of(stack: RunningStack) -> Places:
    """Where a checker looks: addresses, no code of ours."""
    settings = stack.settings
    return Places(
        settings.kafka.bootstrap_servers,
        settings.clickhouse.host,
        settings.clickhouse.port,
        settings.clickhouse.database,
        settings.redis.url,
        settings.redis.namespace,
        schemas_dir(),
    )


def wait_for(is_so: Callable[[], object], seconds: float) -> bool:
    """Whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True
