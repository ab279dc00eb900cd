"""Kafka: one KRaft node that is broker and controller."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from meterline.errors import UserError
from meterline.local.java import Java, find_java
from meterline.local.kafka_jars import cache_directory, kafka_jars, lock_digest
from meterline.local.ports import HOST, Ports

__all__ = ["BROKER_SETTINGS", "Kafka"]

BROKER_SETTINGS = {
    # A mistyped topic name must be an error, not a topic with the wrong number of partitions.
    "auto.create.topics.enable": "false",
    # One node: nothing can be replicated.
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # 50 partitions each by default: a second of start and 100 directories for nothing.
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    # A worker alone in its group doesn't wait 3 s for others.
    "group.initial.rebalance.delay.ms": "0",
    # A source record is at most 512 KiB; the topics derived from it take twice that and headroom.
    "message.max.bytes": "2097152",
    "num.network.threads": "2",
    "num.io.threads": "4",
    # The cleaner's default takes 128 MB of a heap of 256 MB.
    "log.cleaner.dedupe.buffer.size": "16777216",
}
"""The same in docker-compose.yml, where a test compares them."""

HEAP_MAX = "256m"
"""Measured: 64 MB serve a million records; the rest is for large batches."""

FAST_START = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
"""Ready in 2.3 s instead of 5 s; throughput on two cores stays the same."""

FORMAT_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 2.0
NEW_ARCHIVE, ARCHIVE_TARGET = "classes.jsa", "classes.target"


class Kafka:
    """The service. Its data is one directory, its identity the cluster id in it."""

    name = "kafka"
    extra = ("jgo",)

    def __init__(self, directory: Path, ports: Ports, cancelled: threading.Event) -> None:
        self._directory = directory
        self._ports = ports
        self._cancelled = cancelled
        self._data = directory / "data"
        self._properties = directory / "server.properties"

    def ports(self) -> dict[str, int]:
        """Broker and controller."""
        return {"kafka": self._ports.kafka, "kafka_controller": self._ports.kafka_controller}

    def prepare(self, progress: Callable[[str], None]) -> list[str]:
        """Find Java, download Kafka, format the storage: each once."""
        progress("looking for Java")
        java = find_java()
        jars = kafka_jars(progress, self._cancelled)
        launcher = [str(java.binary), *FAST_START, "-cp", ":".join(map(str, jars))]
        self._directory.mkdir(parents=True, exist_ok=True)
        self._properties.write_text(self._property_lines(self._data))
        if not self._data.exists():
            progress("formatting its storage")
            self._format(launcher)
        heap = ["-Xms64m", f"-Xmx{HEAP_MAX}"]
        return [*launcher, *heap, *self._class_archive(java), "kafka.Kafka", str(self._properties)]

    def is_ready(self, pid: int) -> bool:  # noqa: ARG002 - the cluster id proves more than a pid
        """Our own cluster answers."""
        with suppress(OSError), socket.create_connection((HOST, self._ports.kafka), PROBE_TIMEOUT_S):
            try:
                client = AdminClient({"bootstrap.servers": f"{HOST}:{self._ports.kafka}", "log_level": 0})
                return bool(client.list_topics(timeout=PROBE_TIMEOUT_S).cluster_id == self._cluster_id())
            except KafkaException:
                return False
        return False

    def stopped(self) -> None:
        """Keep the class archive of a broker that ended in peace; only then it is whole."""
        new = self._directory / NEW_ARCHIVE
        if new.is_file():
            target = Path((self._directory / ARCHIVE_TARGET).read_text())
            partial = target.with_suffix(f".{os.getpid()}")
            shutil.move(new, partial)
            partial.replace(target)

    def _class_archive(self, java: Java) -> list[str]:
        """Use the class archive of this Java and these jars, or write one at exit: it halves a start."""
        key = hashlib.sha256(f"{java.build}{lock_digest()}{FAST_START}".encode()).hexdigest()[:12]
        archive = cache_directory() / f"kafka-{key}.jsa"
        new = self._directory / NEW_ARCHIVE
        new.unlink(missing_ok=True)
        if archive.exists():
            return [f"-XX:SharedArchiveFile={archive}", "-Xlog:disable"]
        (self._directory / ARCHIVE_TARGET).write_text(str(archive))
        return [f"-XX:ArchiveClassesAtExit={new}", "-Xlog:disable"]

    def _format(self, launcher: list[str]) -> None:
        """Write the storage's identity; in a directory of its own first, so that it is whole or absent."""
        unfinished = self._directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        properties = self._directory / "format.properties"
        properties.write_text(self._property_lines(unfinished))
        # Kafka refuses ids that begin with a dash: its command lines would take them for options.
        cluster_id = "M" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
        command = [*launcher, "kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(properties)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=FORMAT_TIMEOUT_S)  # noqa: S603 - ours
        except subprocess.SubprocessError as error:
            said = getattr(error, "stderr", "") or getattr(error, "stdout", "") or error
            raise UserError(f"Kafka's storage in {self._directory} can't be formatted: {said}") from None
        unfinished.rename(self._data)

    def _cluster_id(self) -> str:
        """The id that the storage was formatted with."""
        lines = (self._data / "meta.properties").read_text().splitlines()
        return next(line.removeprefix("cluster.id=") for line in lines if line.startswith("cluster.id="))

    def _property_lines(self, data: Path) -> str:
        broker, controller = f"{HOST}:{self._ports.kafka}", f"{HOST}:{self._ports.kafka_controller}"
        properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "listeners": f"PLAINTEXT://{broker},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{broker}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(data),
            **BROKER_SETTINGS,
        }
        return "".join(f"{name}={value}\n" for name, value in properties.items())
