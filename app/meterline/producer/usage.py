"""`UsageProducer`: publishes usage events to Kafka and lets no failure pass in silence."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_to_record
from meterline.contracts.topics import USAGE_EVENTS
from meterline.domain.events import UsageEvent
from meterline.errors import RetryLater, UserError, WorkerMustExit
from meterline.producer.errors import DeliveryFailed, InvalidUsage
from meterline.producer.events import build_event, require_valid
from meterline.producer.recent import RecentEvents
from meterline.settings import Settings, load_settings

__all__ = ["Acknowledged", "UsageProducer"]

RECORD_BYTES_MAX = 512 * 1024 - 1024
"""The contract of usage.events is 512 KiB, and the broker counts the framing of the batch around it too."""
BATCH_BYTES_MAX = 256 * 1024
"""The broker holds the whole unpacked batch against the record limit; a larger one would gain nothing."""
QUEUE_EVENTS_MAX = 100_000
"""About one second of the fastest publishing: enough to ride out a leader election without blocking."""
QUEUE_KIB_MAX = 64 * 1024
"""Memory for queued events whatever their size: 128 of the largest."""
PUBLISH_TIMEOUT_S = 30.0
"""How long publish() waits for room: longer than a leader election, shorter than most tasks' own timeout."""
DELIVERY_TIMEOUT_MS = 120_000
"""How long an event is tried before it is given up and reported: Kafka's own default."""
FLUSH_TIMEOUT_S = 30.0
"""Within Kubernetes' default grace between SIGTERM and SIGKILL."""
POLL_S = 0.1
"""Longest wait inside librdkafka, which Python's signal handlers cannot interrupt."""

ANSWER_S = 2.0
"""Wait for one answer about the topics: a broker far away takes less, and Ctrl-C is not kept longer."""

OnDelivery = Callable[[str, Exception | None], None]


class Acknowledged(NamedTuple):
    """Where an event stands in usage.events.

    Attributes:
        offset: negative when Kafka told of a copy it had already, not of its place.
    """

    partition: int
    offset: int


OnOutcome = Callable[[Acknowledged | DeliveryFailed], None]

_log = logging.getLogger("meterline.producer")
_log.addHandler(logging.NullHandler())  # the application decides whether librdkafka's messages are seen


class UsageProducer:
    """Publishes usage events; thread-safe; create one per process and close it.

        with UsageProducer() as usage:
            usage.publish(client_id="acme", correlation_id=task.id, sku="gpu-second", credits="17.25")

    `publish` queues; a thread of librdkafka sends in batches and retries. The event is durable when Kafka has
    acknowledged it: after `flush()` or `close()` returned, or when `on_delivery(event_id, None)` was called.
    An event that was given up is never silent: the next `publish`, `flush` or `close` raises `DeliveryFailed`
    with the ids, each of them once.

    What it alone does not survive: a process that is killed, or a machine that dies, before the flush loses
    the events still in its queue; after a task run again the same events are published under the same ids.
    It must be created after a fork, in the process that uses it.

    Args:
        settings: None reads the environment (`METERLINE_KAFKA__...`).
        on_delivery: called from a background thread for every event with its id and None, or the error. It
            should be quick: it holds up the others. What it raises reaches the next publish or flush.
        publish_timeout_s: how long `publish` waits for room in the full queue before it raises `RetryLater`.
        client_config: more librdkafka properties, by their names there; they win over Meterline's own.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        on_delivery: OnDelivery | None = None,
        publish_timeout_s: float = PUBLISH_TIMEOUT_S,
        client_config: Mapping[str, Any] | None = None,
    ) -> None:
        kafka = (settings or load_settings()).kafka
        self._servers = kafka.bootstrap_servers
        self._codec = RecordCodec("usage-event", kafka.registry_url)
        self._on_delivery = on_delivery
        self._publish_timeout_s = publish_timeout_s
        self._lock = threading.Lock()
        """Guards everything below, and that nothing is queued after close() began its flush."""
        self._recent = RecentEvents()
        self._failures: list[tuple[str, str]] = []
        """Not yet reported. At most a queue full: publish() tells these before it adds events."""
        self._acknowledged = 0
        self._broken: Exception | None = None
        self._closed = False
        self._trouble = ""
        """The last thing librdkafka complained about, to explain a timeout."""
        self._process_id = os.getpid()
        try:
            self._producer = Producer(
                {
                    "client.id": "meterline-producer",
                    "enable.idempotence": True,
                    "acks": "all",
                    # Java's hash, as everywhere in the pipeline. Unlike murmur2_random it would also send
                    # keyless records to one partition; ours always have a key.
                    "partitioner": "murmur2",
                    "compression.type": "lz4",
                    "linger.ms": 5,
                    "batch.size": BATCH_BYTES_MAX,
                    "queue.buffering.max.messages": QUEUE_EVENTS_MAX,
                    "queue.buffering.max.kbytes": QUEUE_KIB_MAX,
                    "message.timeout.ms": DELIVERY_TIMEOUT_MS,
                    "error_cb": self._note_trouble,
                    "logger": _log,
                    **kafka.client_config(),
                    **(client_config or {}),
                }
            )
        except KafkaException as error:
            raise UserError(f"Kafka's client refuses the METERLINE_KAFKA__ settings: {error}") from None
        self._stopping = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="meterline-producer", daemon=True)
        self._poller.start()
        atexit.register(self._close_at_exit)

    def publish(
        self,
        *,
        client_id: str,
        correlation_id: str,
        sku: str,
        credits: Decimal | int | str,  # noqa: A002 - the domain's word; nobody calls the interpreter's credits()
        item: int = 0,
        occurred_at: datetime | None = None,
        attributes: Mapping[str, str] | None = None,
        event_id: str | None = None,
        source: str = "",
        reservation_id: str | None = None,
        billable: bool = True,
    ) -> str:
        """Queue one usage event. The same event again is harmless: it has the same id and is counted once.

        Args:
            client_id: who pays; at most 200 bytes, as the other ids.
            correlation_id: the task; the same when the task is run again.
            sku: what was used.
            credits: exact credits; floats are refused.
            item: numbers the charges of one task in one SKU.
            occurred_at: with a time zone; None: now.
            attributes: at most 64 texts for the receipt, not compared and not billed.
            event_id: an own id, unique for the client, instead of the deterministic one.
            source: which program or machine.
            reservation_id: the credit reservation this settles.
            billable: False: shown on the receipt, not billed.

        Returns:
            The event id.

        Raises:
            InvalidUsage: metering would refuse it, or this process just published other credits under this
                id. It was not queued.
            DeliveryFailed: earlier events were given up. This one was not queued.
            RetryLater: the queue stayed full. This one was not queued.
            WorkerMustExit: Kafka refuses this producer for good.
        """
        now_ms = time.time_ns() // 1_000_000
        return self._send(
            build_event(
                client_id=client_id,
                correlation_id=correlation_id,
                sku=sku,
                credits=credits,
                item=item,
                occurred_at=occurred_at,
                attributes=attributes,
                event_id=event_id,
                source=source,
                reservation_id=reservation_id,
                billable=billable,
                now_ms=now_ms,
            )
        )

    def publish_event(self, event: UsageEvent) -> str:
        """Queue an event that was built elsewhere, also a correction. Returns and raises like `publish`."""
        require_valid(event, time.time_ns() // 1_000_000)
        return self._send(event)

    def forward(self, event: UsageEvent, on_outcome: OnOutcome) -> None:
        """Queue an event that was judged before and is kept elsewhere until Kafka has it: in a spool.

        It is neither judged again nor compared with what was published: its owner sends it until it is
        acknowledged. For the same reason an event that was given up is told to `on_outcome` alone.

        Args:
            on_outcome: called once, from a background thread, with the place in the log or the failure. It
                must be quick. What it raises reaches the next publish or flush.

        Raises:
            RetryLater: the queue stayed full, or the registry is away. It was not queued.
            WorkerMustExit: Kafka refuses this producer for good; another one may go on.
        """
        self._send(event, on_outcome)

    @property
    def acknowledged(self) -> int:
        """Events Kafka has acknowledged so far."""
        return self._acknowledged

    def check(self, timeout_s: float = 5.0) -> None:
        """Ask whether Kafka answers and has the topic, for programs that want to know before they start.

        Raises:
            RetryLater: no answer within `timeout_s`.
            UserError: the topic does not exist.
        """
        topics = self._topics(timeout_s)
        if USAGE_EVENTS not in topics:
            raise UserError(
                f"Kafka at {self._servers} has no topic {USAGE_EVENTS}. Create the topics with "
                "`meterline topics apply`."
            )

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Wait until every queued event is acknowledged.

        Raises:
            DeliveryFailed: events were given up.
            RetryLater: some are still being tried after `timeout_s`.
        """
        self._require_own_process()
        waiting = self._drain(timeout_s)
        with self._lock:
            self._raise_trouble()
        if waiting:
            raise RetryLater(
                f"{waiting} event(s) are not yet acknowledged by Kafka at {self._servers} after {timeout_s} s"
                f"{self._trouble}. They stay queued; flush again."
            )

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Wait until every queued event is acknowledged, give up the rest, and stop. Again: does nothing.

        After a fork the child's close does nothing either: the queue is the parent's.

        Raises:
            DeliveryFailed: with the events that were given up, now or earlier.
        """
        if os.getpid() != self._process_id:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self._close_at_exit)
        try:
            if self._drain(timeout_s):
                self._producer.purge()
                self._drain(timeout_s)
        finally:
            self._stopping.set()
            self._poller.join()
        with self._lock:
            self._raise_trouble()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except DeliveryFailed as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what went wrong first stays what is raised

    def _send(self, event: UsageEvent, on_outcome: OnOutcome | None = None) -> str:
        value = self._codec.encode(event_to_record(event))
        key = event.client_id.encode()
        if len(key) + len(value) > RECORD_BYTES_MAX:
            raise InvalidUsage(
                f"the event takes {len(key) + len(value)} bytes, more than the {RECORD_BYTES_MAX} of one "
                "record; shorten its attributes"
            )
        if on_outcome is None:
            report = partial(self._report, event.event_id)
        else:
            report = partial(self._report_outcome, event.event_id, on_outcome)
        deadline = 0.0
        while not self._queue(event, key, value, report, is_kept=on_outcome is not None):
            now = time.monotonic()
            deadline = deadline or now + self._publish_timeout_s
            if now >= deadline:
                raise RetryLater(
                    f"the queue stayed full for {self._publish_timeout_s} s: Kafka at {self._servers} takes "
                    f"none or too few{self._trouble}. This event was not queued; publish it again."
                )
            self._producer.poll(min(POLL_S, deadline - now))
        return event.event_id

    def _queue(
        self, event: UsageEvent, key: bytes, value: bytes, report: Callable[..., None], *, is_kept: bool
    ) -> bool:
        """Hand one event to librdkafka; False: no room now."""
        self._require_own_process()
        with self._lock:
            if self._closed:
                raise UserError("this UsageProducer is closed; create another one")
            self._raise_trouble()
            is_new = not is_kept and self._recent.note(event)
            try:
                self._producer.produce(USAGE_EVENTS, value, key, on_delivery=report)
            except BaseException as error:  # whatever it was, the event was not taken
                if is_new:
                    self._recent.forget(event)
                if isinstance(error, BufferError):
                    return False
                if isinstance(error, KafkaException):
                    raise WorkerMustExit(
                        f"Kafka refuses this producer for good: {error}. Close it, and publish again what "
                        "close() lists, with a new UsageProducer or after a restart."
                    ) from None
                raise
        return True

    def _require_own_process(self) -> None:
        """Asked before the lock is taken: a lock that was held at the fork is never released in the child."""
        if os.getpid() != self._process_id:
            raise UserError(
                "this UsageProducer was created before a fork and cannot send from the new process; "
                "create it in the process that publishes (for example in a post-fork hook)"
            )

    def _raise_trouble(self) -> None:
        """Tell the caller what happened in the background: each thing once."""
        if self._failures:
            failures, self._failures = tuple(self._failures), []
            raise DeliveryFailed(failures)
        if self._broken is not None:
            broken, self._broken = self._broken, None
            raise broken

    def _topics(self, timeout_s: float) -> Any:
        """Asked in slices that let signals through, until Kafka answers."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._producer.list_topics(timeout=min(ANSWER_S, timeout_s)).topics
            except KafkaException:
                if time.monotonic() < deadline:
                    continue
                raise RetryLater(
                    f"Kafka does not answer at {self._servers}{self._trouble}. Start the local stack with "
                    "`meterline up`, or set METERLINE_KAFKA__BOOTSTRAP_SERVERS."
                ) from None

    def _drain(self, timeout_s: float) -> int:
        """Wait for the queue to empty, in slices that let signals through; how many are left."""
        deadline = time.monotonic() + timeout_s
        while waiting := int(self._producer.flush(POLL_S)):
            if time.monotonic() >= deadline:
                return waiting
        return 0

    def _poll(self) -> None:
        while not self._stopping.is_set():
            self._producer.poll(POLL_S)

    def _report(self, event_id: str, error: KafkaError | None, _message: object) -> None:
        """Librdkafka's verdict on one event. Runs in whichever thread polls; must not raise."""
        with self._lock:
            if error is None:
                self._acknowledged += 1
            else:
                self._failures.append((event_id, error.str()))
        if self._on_delivery is not None:
            self._tell(self._on_delivery, event_id, None if error is None else _given_up(event_id, error))

    def _report_outcome(
        self, event_id: str, on_outcome: OnOutcome, error: KafkaError | None, message: Message
    ) -> None:
        """As above, for an event that was forwarded."""
        if error is not None:
            self._tell(on_outcome, _given_up(event_id, error))
            return
        with self._lock:
            self._acknowledged += 1
        partition, offset = message.partition(), message.offset()
        assert partition is not None  # the library's stubs allow for messages that were never sent
        self._tell(on_outcome, Acknowledged(partition, -1 if offset is None else offset))

    def _tell(self, callback: Callable[..., None], *outcome: object) -> None:
        try:
            callback(*outcome)
        except Exception as raised:  # noqa: BLE001 - kept for the caller; here it would end the polling
            with self._lock:
                self._broken = self._broken or raised

    def _note_trouble(self, error: KafkaError) -> None:
        self._trouble = f" ({error.str()})"

    def _close_at_exit(self) -> None:
        """A program that ends without close() must not lose what it queued."""
        self.close()


def _given_up(event_id: str, error: KafkaError) -> DeliveryFailed:
    return DeliveryFailed(((event_id, error.str()),))
