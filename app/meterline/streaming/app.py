"""Build and run the Faust app of a worker: `app`, `topic`, `table`, `agent` and the health pages together."""

from __future__ import annotations

import asyncio
import logging
import resource
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import faust
import mode
from aiokafka.helpers import create_ssl_context
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from meterline.errors import UserError
from meterline.logs import configure_logs, get_logger
from meterline.settings import KafkaSettings, Settings
from meterline.streaming.batches import Checksum, keep_batches_whole
from meterline.streaming.broker_log import KafkaLog
from meterline.streaming.chunks import RecordChunkSchema
from meterline.streaming.consumer import ChunkTransport, read_whole_answers
from meterline.streaming.engine import Engine, EngineLimits
from meterline.streaming.fatal import die, remember_exits
from meterline.streaming.log_ranges import topic_partition_counts
from meterline.streaming.memory import (
    GIVE_BACK_INTERVAL_S,
    give_back_memory,
    keep_memory,
    look_seldom_for_cycles,
    taking_over_state,
)
from meterline.streaming.owner import PartitionOwner
from meterline.streaming.tables import CommittedTable, CommittedTables

__all__ = ["WorkerApp", "WorkerPlan", "build_app", "run_worker"]

ALIVE_WITHIN_S = 60.0
"""Liveness: the worker's own loop turned within this time. It never asks another service: waiting for
ClickHouse is no reason to be killed."""

FETCH_BYTES_MAX = 2 * 1024 * 1024
STREAM_BUFFER_CHUNKS = 16
"""Chunks in Faust's queue: a bound on memory, not on speed."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What a worker is made of.

    Attributes:
        name: Faust app id, consumer group and prefix of the transactional ids.
        source_topic: the topic whose partitions it owns.
        other_topics: topics it writes to.
        limits: when to flush, when to stop taking in.
        web_port: health and metrics, where the settings name no port.
        open: called once on the running loop with the partition count of every topic; returns what makes the
            owner of a partition.
        before_fencing: waits until what a restore reads is there; nobody is fenced while it isn't.
        close: called once after the last partition was dropped.
        in_batches: owners are fed `BatchedRecords` instead of lists of records.
        checksum: of those batches, where there is a faster one than aiokafka's.
    """

    name: str
    source_topic: str
    other_topics: tuple[str, ...]
    limits: EngineLimits
    web_port: int
    open: Callable[[Mapping[str, int]], Awaitable[Callable[[int], PartitionOwner]]]
    before_fencing: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]
    in_batches: bool = False
    checksum: Checksum | None = None

    @property
    def changelog(self) -> str:
        """The topic of the state table, as Faust names it."""
        return f"{self.name}-state-changelog"


class WorkerApp(faust.App):
    """A Faust app whose partitions are owned by our engine."""

    plan: WorkerPlan
    engine: Engine
    turned_at: float = 0.0

    @property
    def positions(self) -> Engine:
        """Whom the consumer asks where to read."""
        return self.engine

    async def on_start(self) -> None:
        """Build the engine before Faust joins the group."""
        self.turned_at = time.monotonic()  # the task that goes on with it starts after the first assignment
        counts = await asyncio.to_thread(partition_counts, self.plan, self.kafka)
        make_owner = await self.plan.open(counts)
        table: Any = self.tables["state"]
        consumer: Any = self.consumer
        self.engine = Engine(
            group=self.plan.name,
            source_topic=self.plan.source_topic,
            changelog=self.plan.changelog,
            broker=KafkaLog(self.kafka),
            limits=self.plan.limits,
            make_owner=make_owner,
            before_fencing=self.plan.before_fencing,
            committed=table.committed,
            caught_up=consumer.caught_up,
            seek_soon=consumer.seek_soon,
            log_end=consumer.log_end,
        )
        table.take_over = self._take_over
        self.add_future(self._watch_group())
        await super().on_start()

    async def on_stop(self) -> None:
        """Let go of the partitions before Faust leaves the group."""
        await self.engine.stop()
        await self.plan.close()
        await super().on_stop()

    async def _take_over(self, wanted: set[int]) -> None:
        with taking_over_state() if wanted - self.engine.partitions.keys() else nullcontext():
            await self.engine.take_over(wanted)

    async def _watch_group(self) -> None:
        """End the process when its part in the group has ended. Before the first assignment, too."""
        consumer: Any = self.consumer
        while not self.should_stop:
            if (failure := consumer.group_failure()) is not None:
                die("its part in the group has ended: no partition would come any more", failure)
            await asyncio.sleep(1.0)

    kafka: KafkaSettings


def partition_counts(plan: WorkerPlan, kafka: KafkaSettings) -> Mapping[str, int]:
    """How many partitions each topic of the plan has. Blocks.

    Raises:
        UserError: a topic is missing, or the changelog has another count than the source.
        RetryLater: Kafka doesn't answer.
    """
    counts = topic_partition_counts(kafka, [plan.source_topic, plan.changelog, *plan.other_topics])
    if counts[plan.changelog] != counts[plan.source_topic]:
        raise UserError(
            f"{plan.changelog} has {counts[plan.changelog]} partitions, {plan.source_topic} has "
            f"{counts[plan.source_topic]}: they must be equal. See: meterline topics plan"
        )
    return counts


def build_app(plan: WorkerPlan, settings: Settings) -> WorkerApp:
    """A Faust app that runs the plan. Touches no network before it starts."""
    worker = settings.worker
    app = WorkerApp(
        plan.name,
        broker=f"kafka://{settings.kafka.bootstrap_servers.replace(',', ';kafka://')}",
        broker_credentials=_credentials(settings.kafka),
        store="memory://",
        datadir=worker.data_dir or str(Path(tempfile.gettempdir()) / f"meterline-{plan.name}"),
        topic_allow_declare=False,  # topics are created by `meterline topics apply`
        topic_disable_leader=True,
        table_standby_replicas=0,
        Table=CommittedTable,
        TableManager=CommittedTables,
        stream_buffer_maxsize=STREAM_BUFFER_CHUNKS,
        stream_wait_empty=False,  # a rebalance waits for open transactions only
        broker_commit_interval=1.0,  # lag displays follow; nothing depends on it
        broker_session_timeout=worker.session_timeout_ms / 1000,
        broker_heartbeat_interval=worker.session_timeout_ms / 5000,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=FETCH_BYTES_MAX,
        consumer_metadata_max_age_ms=worker.metadata_max_age_ms,
        consumer_group_instance_id=worker.instance_id or None,
        canonical_url=_address(worker.instance_id),
        producer_acks=-1,
        worker_redirect_stdouts=False,
        web_port=worker.web_port or plan.web_port,
        web_bind=worker.web_host,
        web_host=worker.web_host,
        web_tables_enabled=False,  # they would show clients' data to anyone
        web_router_enabled=False,
    )
    read_whole_answers()
    if plan.in_batches:
        keep_batches_whole(plan.source_topic, plan.checksum)
    app.plan = plan
    app.kafka = settings.kafka
    app.transport = ChunkTransport(app.conf.broker_consumer, app)
    source = app.topic(plan.source_topic, schema=RecordChunkSchema())
    app.Table("state", key_type=bytes, value_type=bytes)

    @app.agent(source, supervisor_strategy=mode.CrashingSupervisor)
    async def records(stream: Any) -> None:
        async for event in stream.noack().events():
            await app.engine.deliver(event)

    @app.task  # type: ignore[untyped-decorator]  # Faust's
    async def turn() -> None:
        while not app.should_stop:
            app.turned_at = time.monotonic()
            await asyncio.sleep(1.0)

    @app.timer(GIVE_BACK_INTERVAL_S)  # type: ignore[untyped-decorator]  # Faust's
    async def give_back() -> None:
        give_back_memory()

    _add_pages(app)
    return app


def _address(instance_id: str) -> str | None:
    """How a static member is named in the group's assignment; None: by its health page, as Faust does.

    The broker hands a restarted static member the assignment of the process before it, and Faust refuses one
    that is addressed to another host or port: the worker would never get partitions, and never end.
    """
    return f"http://member/{quote(instance_id, safe='')}" if instance_id else None


def _add_pages(app: WorkerApp) -> None:
    @app.page("/healthz/live")
    async def live(view: Any, _request: Any) -> Any:
        stuck_s = time.monotonic() - app.turned_at
        alive = stuck_s < ALIVE_WITHIN_S
        return view.json(
            {"alive": alive, "loop_turned_s_ago": round(stuck_s, 1)}, status=200 if alive else 503
        )

    @app.page("/healthz/ready")
    async def ready(view: Any, _request: Any) -> Any:
        problems = app.engine.problems()
        answer = {
            "ready": not problems,
            "partitions": sorted(app.engine.partitions),
            "problems": problems,
        }
        return view.json(answer, status=503 if problems else 200)

    @app.page("/metrics")
    async def metrics(view: Any, _request: Any) -> Any:
        # As a header: aiohttp refuses a charset in `content_type`.
        return view.bytes(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def run_worker(app: WorkerApp, log_level: str = "info") -> None:
    """Run until a signal. Leaves with SystemExit: 0 after SIGINT or SIGTERM, otherwise a failure.

    Raises:
        UserError: a topic is missing or has the wrong partition count, or the web port is taken.
    """
    keep_memory()
    _open_as_many_files_as_allowed()
    configure_logs(log_level)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_lifecycle_chatter)
    partition_counts(app.plan, app.kafka)
    _check_port_is_free(app.conf.web_bind, app.conf.web_port)
    log.info(
        "worker starting", worker=app.plan.name, health=f"http://{app.conf.web_bind}:{app.conf.web_port}"
    )
    threading.current_thread().name = app.plan.name
    remember_exits(Path(app.conf.datadir))
    look_seldom_for_cycles()
    faust.Worker(app, loglevel=log_level, override_logging=False, quiet=True).execute_from_commandline()


def _open_as_many_files_as_allowed() -> None:
    """Ask for the most open files that this user may have.

    A partition keeps some connections open, and each slice of its dedupe index a file: of 40 partitions more
    than the 1,024 that many systems give a process at first.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS calls its limit infinite, and refuses that
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _is_no_lifecycle_chatter(record: logging.LogRecord) -> bool:
    """Faust's services log each start and stop under our modules' names, marked [^."""
    return record.levelno >= logging.WARNING or not str(record.msg).startswith("[^")


def _check_port_is_free(host: str, port: int) -> None:
    import socket  # noqa: PLC0415 - only here

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise UserError(
                f"port {port} is taken (health and metrics). Choose another: --web-port N or "
                "METERLINE_WORKER__WEB_PORT=N"
            ) from None


def _credentials(kafka: KafkaSettings) -> Any:
    context = (
        create_ssl_context(cafile=kafka.ssl_ca_location or None) if "SSL" in kafka.security_protocol else None
    )
    if kafka.security_protocol.startswith("SASL"):
        return faust.SASLCredentials(
            username=kafka.sasl_username,
            password=kafka.sasl_password.get_secret_value(),
            mechanism=kafka.sasl_mechanism,
            ssl_context=context,
        )
    return faust.SSLCredentials(context) if kafka.security_protocol == "SSL" else None
