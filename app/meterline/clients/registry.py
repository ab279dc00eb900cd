"""`ClientRegistry`: follows the compacted topic `clients`, and writes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)

from meterline.clients.records import client_from_record, client_to_record
from meterline.contracts.codec import RecordCodec
from meterline.contracts.topics import CLIENTS
from meterline.domain.clients import Client, check_client
from meterline.domain.reasons import Reason
from meterline.errors import DeadLetterError, RetryLater, UserError
from meterline.logs import get_logger
from meterline.settings import Settings

__all__ = ["ClientRegistry"]

ANSWER_TIMEOUT_S = 10.0
"""How long a single question to Kafka may take: a broker that is up answers in milliseconds."""
POLL_RECORDS_MAX = 1_000
POLL_S = 0.1
"""Longest wait of the following thread: also how late it sees close()."""

log = get_logger(__name__)
_kafka_log = logging.getLogger("meterline.clients.kafka")
_kafka_log.addHandler(logging.NullHandler())  # the application decides whether librdkafka's messages are seen


class ClientRegistry:
    """Who pays, and how.

        with ClientRegistry(settings) as registry:
            registry.wait_until_caught_up(timeout_s=10)
            client = registry.get("acme")

    A thread reads the topic from its beginning, committed records only, as no member of any group, and goes
    on for as long as the registry is open. When it cannot go on, every read raises what stopped it. A record
    that is not understood changes nothing, is logged, and counted in `rejected`: one foreign record must not
    stop the billing of all clients. Thread-safe.

    Attributes:
        version: grows with every change that was read. Whoever holds work for lack of a client looks again
            when it has grown.
        rejected: records that were not understood.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.kafka
        self._codec = RecordCodec("client", settings.kafka.registry_url)
        self._clients: dict[str, Client] = {}
        self._reached: dict[int, int] = {}
        """For each partition the offset below which everything was read."""
        self._progress = threading.Condition()
        """Guards the two above, version, rejected and the failure; signals each change."""
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._consumer: Any = None
        self._thread: threading.Thread | None = None
        self.version = 0
        self.rejected = 0

    def start(self) -> None:
        """Begin to follow the topic.

        Raises:
            RetryLater: Kafka does not answer.
            UserError: the topic does not exist.
        """
        if self._thread is not None:
            raise UserError("this ClientRegistry is already started")
        consumer = self._new_client(
            Consumer,
            {
                # The library insists on a name; nothing joins a group or commits under it.
                "group.id": "meterline-clients-reader",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
                # Tells the end of the log also where it ends in marks of transactions: those are no records.
                "enable.partition.eof": True,
            },
        )
        try:
            partitions = self._partitions(consumer)
        except BaseException:  # whatever ended it, Ctrl-C too: nobody else closes it
            consumer.close()
            raise
        consumer.assign([TopicPartition(CLIENTS, partition, OFFSET_BEGINNING) for partition in partitions])
        self._reached = dict.fromkeys(partitions, 0)
        self._consumer = consumer
        self._thread = threading.Thread(target=self._follow, name="meterline-clients", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following. Again: does nothing."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, client_id: str) -> Client | None:
        """The client as last read; None: the registry does not know it."""
        with self._progress:
            self._require_following()
            return self._clients.get(client_id)

    def snapshot(self) -> dict[str, Client]:
        """All clients as last read, by id."""
        with self._progress:
            self._require_following()
            return dict(self._clients)

    def wait_until_caught_up(self, timeout_s: float) -> None:
        """Wait until everything that was committed to the topic before this call has been read.

        Raises:
            RetryLater: not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._progress:
            self._require_following()
        ends = self._end_offsets(timeout_s)
        with self._progress:
            while any(self._reached[partition] < end for partition, end in ends.items()):
                self._require_following()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise RetryLater(
                        f"the topic {CLIENTS} was not read to its end within {timeout_s} s: "
                        f"read up to {self._reached}, end {ends}"
                    )
                self._progress.wait(left)

    def put(self, client: Client) -> None:
        """Write a client's record; returns when Kafka has acknowledged it. Needs no `start`.

        The whole record replaces the former one: change one that was read, with `dataclasses.replace`.

        Raises:
            UserError: a field breaks a rule; nothing was written.
            RetryLater: not acknowledged; write it again.
        """
        try:
            check_client(client)
        except ValueError as error:
            raise UserError(str(error)) from None
        value = self._codec.encode(client_to_record(client))
        outcome: list[KafkaError | None] = []
        producer = self._new_client(
            Producer,
            {
                "enable.idempotence": True,
                "acks": "all",
                "partitioner": "murmur2",
                "message.timeout.ms": int(ANSWER_TIMEOUT_S * 1000),
            },
        )
        producer.produce(
            CLIENTS, value, client.client_id.encode(), on_delivery=lambda error, _: outcome.append(error)
        )
        producer.flush(ANSWER_TIMEOUT_S + 1)
        if outcome != [None]:
            reason = outcome[0].str() if outcome and outcome[0] else "no answer"
            raise RetryLater(
                f"the record of client {client.client_id!r} was not acknowledged by Kafka at "
                f"{self._settings.bootstrap_servers}: {reason}. Write it again."
            )

    def _new_client(self, kind: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> Any:
        try:
            return kind(
                {
                    "client.id": "meterline-clients",
                    "logger": _kafka_log,
                    **config,
                    **self._settings.client_config(),
                }
            )
        except KafkaException as error:
            raise UserError(f"Kafka's client refuses the METERLINE_KAFKA__ settings: {error}") from None

    def _partitions(self, consumer: Any) -> list[int]:
        try:
            topics = consumer.list_topics(timeout=ANSWER_TIMEOUT_S).topics
        except KafkaException as error:
            raise RetryLater(
                f"Kafka does not answer at {self._settings.bootstrap_servers} ({error.args[0].str()}). Start "
                "the local stack with `meterline up`, or set METERLINE_KAFKA__BOOTSTRAP_SERVERS."
            ) from None
        if CLIENTS not in topics:
            raise UserError(
                f"Kafka at {self._settings.bootstrap_servers} has no topic {CLIENTS}. Create the topics with "
                "`meterline topics apply`."
            )
        return list(topics[CLIENTS].partitions)

    def _end_offsets(self, timeout_s: float) -> dict[int, int]:
        """Where the committed part of each partition ends (the last stable offset).

        Asked by a client of its own: beside another thread's `consume` the question is never answered.
        """
        asker = self._new_client(
            Consumer, {"group.id": "meterline-clients-reader", "isolation.level": "read_committed"}
        )
        try:
            return {
                partition: int(
                    asker.get_watermark_offsets(TopicPartition(CLIENTS, partition), timeout=timeout_s)[1]
                )
                for partition in self._reached
            }
        except KafkaException as error:
            raise RetryLater(f"Kafka does not say where {CLIENTS} ends: {error}") from None
        finally:
            asker.close()

    def _require_following(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._thread is None or self._stopping.is_set():
            raise UserError("this ClientRegistry is not started, or closed")

    def _follow(self) -> None:
        try:
            while not self._stopping.is_set():
                messages = self._consumer.consume(POLL_RECORDS_MAX, POLL_S)
                if messages:
                    self._apply(messages)
        except Exception as error:  # noqa: BLE001 - handed to whoever reads the registry
            with self._progress:
                self._failure = error
                self._progress.notify_all()
        finally:
            self._consumer.close()

    def _apply(self, messages: list[Any]) -> None:
        with self._progress:
            for message in messages:
                error = message.error()
                if error is None:
                    self._apply_record(message)
                    self._reached[message.partition()] = message.offset() + 1
                elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's public code for it
                    self._reached[message.partition()] = message.offset()
                else:
                    self._require_passing(error)
            self._progress.notify_all()

    def _require_passing(self, error: KafkaError) -> None:
        """A broker that is away comes back by itself; anything else must be told.

        Raises:
            RetryLater: the registry cannot go on.
        """
        if error.code() in {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE}:  # noqa: SLF001 - librdkafka's public codes
            log.warning("kafka is away; the client registry stands still", error=error.str())
            return
        raise RetryLater(f"the topic {CLIENTS} cannot be read: {error.str()}")

    def _apply_record(self, message: Any) -> None:
        try:
            client_id = (message.key() or b"").decode()
            client = self._client_of(client_id, message.value())
        except (DeadLetterError, UnicodeDecodeError) as error:
            self.rejected += 1
            log.error(  # noqa: TRY400 - the record is at fault; a traceback would say nothing more
                "record of the client registry is not understood; the former one stands",
                partition=message.partition(),
                offset=message.offset(),
                reason=str(error),
            )
            return
        if client is None:
            self._clients.pop(client_id, None)
        else:
            self._clients[client_id] = client
        self.version += 1

    def _client_of(self, client_id: str, value: bytes | None) -> Client | None:
        """The client in a record; None: the record removes it."""
        if value is None:
            return None
        client = client_from_record(self._codec.decode(value))
        if client.client_id != client_id:  # compaction goes by the key: this record could not last
            raise DeadLetterError(Reason.INVALID_FIELD, f"the key is {client_id!r}, not its client_id")
        return client
