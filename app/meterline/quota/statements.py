"""What the log says of every bucket: `usage.totals` and `credit.grants`, read from their first records.

For the check alone. A live bucket is always a little behind the log or ahead of what was read of it, so that
comparing it with one moment of the log would alarm without cause. Here every statement is kept that came
after the first reading: a bucket is right if it stands at *one* of them. What was the newest at the first
reading is the oldest it may stand at.

Of the rules of a bucket nothing is imported: they are written here a second time, in the shortest form.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # public, but not in its __all__
    AdminClient,
    OffsetSpec,
)

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import progress_key
from meterline.contracts.topics import CREDIT_GRANTS, USAGE_TOTALS
from meterline.errors import DeadLetterError, RetryLater, UserError
from meterline.quota.inspect import Source
from meterline.settings import KafkaSettings

__all__ = ["Funds", "LogStatements", "Total"]

ANSWER_S_MAX = 10.0
"""A broker that is up answers a question in milliseconds."""
READ_S_MAX = 300.0
"""Reading to the end: a million statements take about 20 s; a broker that hangs is told as such."""
POLL_RECORDS_MAX = 1_000
POLL_S = 0.2

PROGRESS_TAG = progress_key("", 0).split(b",", maxsplit=1)[0]
"""How the key of a progress record begins; every other record of the topic is a total."""


class Total(NamedTuple):
    """What a client has used from one source partition, every record up to the cutoff."""

    cutoff: int
    events: int
    credits_micro: int
    free_events: int
    free_credits_micro: int


class Funds(NamedTuple):
    """What a client may use, and from where on its usage counts.

    Attributes:
        period_start: milliseconds; None: no period has begun (prepaid only).
    """

    granted_micro: int = 0
    base_micro: int = 0
    period_start: int | None = None


@dataclass(slots=True)
class _Client:
    """The grants of a client in the order of the log."""

    states: list[Funds] = field(default_factory=lambda: [Funds()])
    """After the first reading one; then each that came."""
    grant_ids: set[str] = field(default_factory=set)
    """Of prepaid grants and budgets."""
    first_granted_at: int | None = None

    def apply(self, grant: Mapping[str, Any]) -> None:
        """Take in one record. A copy, and what breaks a rule of grants, gives nothing."""
        kind, amount, start = grant["kind"], grant["credits_micro"], grant["period_start"]
        if grant["grant_id"] in self.grant_ids:
            return
        now = self.states[-1]
        if kind == "baseline":
            # Known by its period, not by its id: the first in the log wins, an older one comes too late.
            if start is None or amount < 0 or (now.period_start is not None and start <= now.period_start):
                return
            self.states.append(Funds(amount, sum(part["credits_micro"] for part in grant["base"]), start))
            return
        if (kind == "prepaid") != (start is None) or amount < (kind == "prepaid"):
            return
        self.grant_ids.add(grant["grant_id"])
        if self.first_granted_at is None:
            self.first_granted_at = grant["granted_at"]
        if kind == "prepaid":
            self.states.append(now._replace(granted_micro=now.granted_micro + amount))


class LogStatements:
    """Reads both topics to their ends, again and again.

    with LogStatements.open(settings.kafka) as log:
        log.read_to_end()
        log.totals("acme")
    """

    def __init__(self, kafka: KafkaSettings, consumer: Consumer, asker: AdminClient) -> None:
        self._consumer = consumer
        self._asker = asker
        """Says where the log ends, over its own connection: behind a fetch that waits it would wait, too."""
        self._reached: dict[tuple[str, int], int] = {}
        self._first_reading = True
        self._total_codec = RecordCodec("usage-total", kafka.registry_url)
        self._progress_codec = RecordCodec("usage-progress", kafka.registry_url)
        self._grant_codec = RecordCodec("credit-grant", kafka.registry_url)
        self._totals: dict[str, dict[Source, list[Total]]] = {}
        self._clients: dict[str, _Client] = {}
        self.progress: dict[Source, tuple[int, int]] = {}
        """Of each source partition: accounted until (ms of the log), published until (offset)."""
        self.contradictions: list[str] = []
        """Statements of one cutoff with different amounts."""
        self.not_understood = 0

    @classmethod
    @contextmanager
    def open(cls, kafka: KafkaSettings) -> Iterator[LogStatements]:
        """Begin at the first record of every partition.

        Raises:
            RetryLater: Kafka does not answer.
            UserError: a topic does not exist, or Kafka's client refuses the settings.
        """
        quiet: dict[str, Any] = kafka.client_config() | {"error_cb": _quiet, "log_level": 0}
        config: dict[str, Any] = {
            # The library insists on a name; nothing joins a group or commits under it.
            "group.id": "meterline-quota-check",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            # Tells the end of the log also where it ends in marks of transactions: those are no records.
            "enable.partition.eof": True,
        }
        try:
            consumer = Consumer(quiet | config)
            asker = AdminClient(quiet)
        except KafkaException as error:
            raise UserError(f"Kafka's client refuses the METERLINE_KAFKA__ settings: {error}") from None
        try:
            partitions = _partitions(consumer, kafka)
            consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for topic, number in partitions])
            statements = cls(kafka, consumer, asker)
            statements._reached = dict.fromkeys(partitions, 0)
            yield statements
        finally:
            consumer.close()

    def read_to_end(self) -> None:
        """Read what was committed before this call.

        Raises:
            RetryLater: Kafka does not answer, or a record cannot be read.
        """
        ends = self._ends()
        deadline = time.monotonic() + READ_S_MAX
        while any(self._reached[place] < end for place, end in ends.items()):
            if time.monotonic() > deadline:
                raise RetryLater(
                    f"{USAGE_TOTALS} and {CREDIT_GRANTS} were not read within {READ_S_MAX:.0f} s"
                )
            for message in self._consumer.consume(POLL_RECORDS_MAX, POLL_S):
                self._take(message)
        if self._first_reading:
            self._first_reading = False
            for client in self._clients.values():
                del client.states[:-1]

    def clients(self) -> set[str]:
        """Who was ever granted credits or used some."""
        return self._clients.keys() | self._totals.keys()

    def totals(self, client_id: str) -> Mapping[Source, list[Total]]:
        """For each source partition the statements a bucket may stand at, in the order of their cutoffs."""
        return self._totals.get(client_id, {})

    def funds(self, client_id: str) -> list[Funds]:
        """What a bucket may say of grants and base, in the order of the log."""
        client = self._clients.get(client_id)
        return [Funds()] if client is None else client.states

    def first_granted_at(self, client_id: str) -> int | None:
        """When the client first was given credits (ms); None: never."""
        client = self._clients.get(client_id)
        return None if client is None else client.first_granted_at

    def _take(self, message: Any) -> None:
        place = (message.topic(), message.partition())
        error = message.error()
        if error is not None:
            if error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's public code for it
                raise RetryLater(f"{message.topic()} cannot be read: {error.str()}")
            self._reached[place] = message.offset()
            return
        self._reached[place] = message.offset() + 1
        try:
            if message.topic() == CREDIT_GRANTS:
                record = self._grant_codec.decode(message.value())
                self._clients.setdefault(record["client_id"], _Client()).apply(record)
            elif (message.key() or b"").startswith(PROGRESS_TAG):
                self._take_progress(self._progress_codec.decode(message.value()))
            elif message.value() is not None:
                self._take_total(self._total_codec.decode(message.value()))
        except DeadLetterError:
            self.not_understood += 1  # foreign; the quota worker passes it by, too

    def _take_total(self, record: Mapping[str, Any]) -> None:
        total = Total(
            record["cutoff_offset"],
            record["count"],
            record["credits_micro"],
            record["free_count"],
            record["free_credits_micro"],
        )
        source = Source(record["topic_id"], record["source_partition"])
        known = self._totals.setdefault(record["client_id"], {}).setdefault(source, [])
        if known and total.cutoff <= known[-1].cutoff:
            if total.cutoff == known[-1].cutoff and total != known[-1]:
                self.contradictions.append(
                    f"{record['client_id']}: two totals of {source.topic_id}/{source.partition} up to offset "
                    f"{total.cutoff}: {known[-1].credits_micro} and {total.credits_micro} micro-credits"
                )
            return
        if self._first_reading:
            known.clear()
        known.append(total)

    def _take_progress(self, record: Mapping[str, Any]) -> None:
        source = Source(record["topic_id"], record["source_partition"])
        until, published = self.progress.get(source, (-1, -1))
        self.progress[source] = (
            max(until, record["accounted_until"]),
            max(published, record["published_until"]),
        )

    def _ends(self) -> dict[tuple[str, int], int]:
        """Where the committed part of each partition ends."""
        latest: Any = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # its own definition has no types
        answers = self._asker.list_offsets(
            {TopicPartition(topic, number): latest for topic, number in self._reached},
            isolation_level=IsolationLevel.READ_COMMITTED,
            request_timeout=ANSWER_S_MAX,
        )
        try:
            return {
                (place.topic, place.partition): answer.result().offset for place, answer in answers.items()
            }
        except KafkaException as error:
            raise RetryLater(f"Kafka does not say where the log ends: {error.args[0].str()}") from None


def _partitions(consumer: Consumer, kafka: KafkaSettings) -> list[tuple[str, int]]:
    try:
        known = consumer.list_topics(timeout=ANSWER_S_MAX).topics
    except KafkaException as error:
        raise RetryLater(
            f"Kafka does not answer at {kafka.bootstrap_servers} ({error.args[0].str()}). Start the local "
            "stack with `meterline up`, or set METERLINE_KAFKA__BOOTSTRAP_SERVERS."
        ) from None
    missing = [topic for topic in (USAGE_TOTALS, CREDIT_GRANTS) if topic not in known]
    if missing:
        raise UserError(
            f"Kafka at {kafka.bootstrap_servers} has no topic {' and no '.join(missing)}. Create the topics "
            "with `meterline topics apply`."
        )
    return [(topic, number) for topic in (USAGE_TOTALS, CREDIT_GRANTS) for number in known[topic].partitions]


def _quiet(_error: object) -> None:
    """Connection errors: librdkafka would print them; what is raised says what matters."""
