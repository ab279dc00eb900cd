"""Quix Streams and Kafka Streams: started, watched by the offsets their groups commit, measured."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from tests.bench.measured import Measurement, measure_after_warm_up, started
from tests.bench.workload import PARTITIONS, WINDOW_LENGTH_MS, Workload

from meterline.contracts.files import schemas_dir
from meterline.errors import UserError
from meterline.local.java import find_java
from meterline.local.kafka_jars import cache_directory, fetch_jars, kafka_jars, read_lock

HERE = Path(__file__).parent
QUIX_PYTHON = Path(
    os.environ.get("BENCH_QUIX_PYTHON", str(Path(sys.prefix) / "bench-quix" / "bin" / "python"))
)
"""Of the environment that `make bench` makes: Quix Streams wants older versions of what we use."""

STREAMS_HEAP = "-Xmx256m"


def quix_command() -> list[str] | None:
    """What starts the Quix Streams side; None where it isn't installed."""
    return [str(QUIX_PYTHON), str(HERE / "quix_streams.py")] if QUIX_PYTHON.exists() else None


def kafka_streams_command() -> list[str] | None:
    """What starts the Kafka Streams side; None where Java is missing, or is one without a compiler."""
    try:
        java = find_java().binary
    except UserError:
        return None
    modules = subprocess.run([java, "--list-modules"], capture_output=True, text=True, check=True).stdout
    if "jdk.compiler@" not in modules:
        return None
    cancelled = threading.Event()
    lock = read_lock((HERE / "kafka-streams.lock").read_text())
    directory = cache_directory() / f"kafka-streams-{lock[0].version}-{lock[0].sha256[:12]}"
    jars = kafka_jars(lambda _: None, cancelled) + fetch_jars(lock, directory, lambda _: None, cancelled)
    return [
        str(java), STREAMS_HEAP, "-cp", os.pathsep.join(map(str, jars)), str(HERE / "KafkaStreamsBench.java"),
    ]  # fmt: skip


def measure_other(
    work: Workload,
    bootstrap: str,
    name: str,
    *,
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
) -> Measurement:
    """Run another library through the events, until its group has committed the last offset."""
    source = NewTopic(name, PARTITIONS, 1, config={"message.timestamp.type": "CreateTime"})
    topics = [source, NewTopic(sums_topic(name), PARTITIONS, 1)]
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for created in admin.create_topics(topics).values():
        created.result(30)
    everything = {
        "BENCH_NAME": name,
        "BENCH_BROKER": bootstrap,
        "BENCH_WINDOW_MS": str(WINDOW_LENGTH_MS),
        "BENCH_DATA_DIR": str(log.parent / name),
        "BENCH_SCHEMA": str(schemas_dir() / "usage-event" / "v1.avsc"),
        **environment,
    }
    watcher = Consumer({"bootstrap.servers": bootstrap, "group.id": name, "enable.auto.commit": False})
    try:
        with started(command, everything, log) as worker:
            return measure_after_warm_up(
                worker, work, bootstrap, name, lambda: _committed(watcher, name), key_has_sku=True
            )
    finally:
        watcher.close()


def sums_topic(name: str) -> str:
    """Where Kafka Streams writes each window's final sums."""
    return f"{name}-sums"


def _committed(watcher: Consumer, topic: str) -> int:
    """Events up to the offsets its group has committed: what is before them it will not count again."""
    offsets = watcher.committed([TopicPartition(topic, number) for number in range(PARTITIONS)], timeout=10)
    return sum(max(0, partition.offset) for partition in offsets)
