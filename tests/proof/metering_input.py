"""What clients do while workers are killed: events, copies, retried tasks, late ones, poison; seeded.

A line is in the input file before its record is published; what is published is never anything else.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Self

from confluent_kafka import KafkaError, Producer
from tests.proof.metering_books import COPY, EVENT, POISON, Line, LineFile

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import event_to_record
from meterline.contracts.topics import USAGE_EVENTS
from meterline.domain.events import UsageEvent, default_event_id
from meterline.domain.reasons import Reason
from meterline.errors import RetryLater
from meterline.producer import DeliveryFailed, UsageProducer
from meterline.settings import Settings

__all__ = ["Lines", "Publisher", "Stream"]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SOURCE = "proof"
CLIENTS, SKUS = 200, 6
CLIENT_SKEW = 1.1
"""Zipf's exponent: the busiest client has about a fifth of the events, as with real clients."""
CREDITS_MICRO_MAX = 5_000_000
RESENT_SHARE = RETRIED_SHARE = 0.0025
LATE_SHARE = 0.005
LATE_MS = (3_000, 40_000)
"""Some late events meet a window that is closed, some one that only the ledger remembers."""
FREE_SHARE = 0.02
POISON_SHARE = 0.0005
POISON_CLIENTS = 2
"""Of few clients, as in life; a flood from many would be a reason to stop."""
REMEMBERED_MAX = 50_000
"""Events that may be sent again: from seconds to minutes ago."""
FUTURE_MS = 4_000_000_000_000
"""The year 2096."""
POISON_EVENTS = {
    Reason.NEGATIVE_CREDITS: {"micro": -5},
    Reason.CREDITS_OUT_OF_RANGE: {"micro": 2**62},
    Reason.TIME_IN_FUTURE: {"occurred_at": FUTURE_MS},
    Reason.CONFLICT: {},
}
POISON_BYTES = {
    Reason.UNKNOWN_FRAMING: lambda _: b'{"client_id": "json is no avro"}',
    Reason.UNKNOWN_SCHEMA: lambda whole: b"\xc3\x01" + bytes(8) + whole[10:],
    Reason.UNDECODABLE: lambda whole: whole[:-3],
}
FLUSH_S_MAX = 180.0
"""A killed broker is back long before."""
TICK_S = 0.1
TAIL_S = 2.0
"""What is left when the last worker has been killed takes this long."""


class Lines:
    """An endless input, the same for the same seed but for its times, which are now."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._clients = [f"client-{n:03}" for n in range(CLIENTS)]
        self._weights = [(rank + 1) ** -CLIENT_SKEW for rank in range(CLIENTS)]
        self._sent: list[Line] = []
        self._events = 0

    def take(self, events: int) -> list[Line]:
        """So many events, and among them what comes with them."""
        now_ms = time.time_ns() // 1_000_000
        clients = self._chance.choices(self._clients, self._weights, k=events)
        return [
            line for client in clients for line in self._with_trouble(self._event(client, now_ms), now_ms)
        ]

    def _event(self, client_id: str, now_ms: int) -> Line:
        chance, task, sku = self._chance, f"task-{self._events}", f"sku-{self._chance.randrange(SKUS)}"
        self._events += 1
        late = chance.randint(*LATE_MS) if chance.random() < LATE_SHARE else 0
        event_id = default_event_id(client_id, task, sku)
        micro = chance.randrange(1, CREDITS_MICRO_MAX)
        return Line(
            EVENT, event_id, client_id, task, sku, micro, chance.random() >= FREE_SHARE, now_ms - late
        )

    def _with_trouble(self, event: Line, now_ms: int) -> Iterator[Line]:
        chance = self._chance
        yield event
        if len(self._sent) < REMEMBERED_MAX:
            self._sent.append(event)
        else:
            self._sent[chance.randrange(REMEMBERED_MAX)] = event
        luck = chance.random()
        if luck < RESENT_SHARE:
            yield chance.choice(self._sent)._replace(kind=COPY)
        elif luck < RESENT_SHARE + RETRIED_SHARE:
            yield chance.choice(self._sent)._replace(kind=COPY, occurred_at=now_ms)
        elif luck > 1 - POISON_SHARE:
            yield self._poison(event, now_ms)

    def _poison(self, event: Line, now_ms: int) -> Line:
        reason = self._chance.choice([*POISON_EVENTS, *POISON_BYTES])
        if reason is Reason.CONFLICT:  # the id of what was accepted just before, with other credits
            return event._replace(kind=POISON, micro=event.micro + 1, reason=reason.value)
        client = self._clients[self._chance.randrange(POISON_CLIENTS)]
        event_id, changed = f"poison-{self._events}", POISON_EVENTS.get(reason, {})
        line = event._replace(
            kind=POISON, event_id=event_id, client_id=client, reason=reason.value, occurred_at=now_ms
        )
        return line._replace(**changed)


class Publisher:
    """Writes lines down and publishes them: what the product's own producer takes, through it."""

    def __init__(self, settings: Settings, path: Path, lines: Lines) -> None:
        self.file = LineFile(path)
        self.lines = lines
        self._usage = UsageProducer(settings)
        self._raw = Producer(settings.kafka.client_config() | {"enable.idempotence": True, "log_level": 0})
        self._codec = RecordCodec("usage-event")
        self._failed: list[object] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._usage.close()

    def publish(self, events: int) -> Counter[str]:
        """So many new events with their trouble, queued; how many lines of each kind."""
        lines = self.lines.take(events)
        self.file.add(lines)
        for line in lines:
            self._send(line)
        self._raw.poll(0)
        return Counter(line.kind for line in lines)

    def withhold(self, events: int) -> list[Line]:
        """A planted loss: events that are in the file and never published."""
        lines = [line for line in self.lines.take(events) if line.kind == EVENT]
        self.file.add(lines)
        return lines

    def twin(self, lines: Sequence[Line], partitions: int) -> None:
        """A planted double: copies by a producer with another partitioner, behind dedupe's back."""
        for line in lines:
            key = line.client_id.encode()
            other = (partition_for(key, partitions) + 1) % partitions
            self._produce(self._codec.encode(event_to_record(_event_of(line))), key, other)

    def flush(self) -> None:
        """Everything is acknowledged."""
        deadline = time.monotonic() + FLUSH_S_MAX
        while True:
            try:
                self._usage.flush()
                break
            except RetryLater:
                if time.monotonic() > deadline:
                    raise
        left = self._raw.flush(FLUSH_S_MAX)
        if left or self._failed:
            raise RuntimeError(f"{left} records are not acknowledged, given up: {self._failed[:3]}")

    def _send(self, line: Line) -> None:
        if line.kind != POISON:
            given = self._usage.publish(
                client_id=line.client_id,
                correlation_id=line.correlation_id,
                sku=line.sku,
                credits=Decimal(line.micro).scaleb(-6),
                occurred_at=EPOCH + timedelta(milliseconds=line.occurred_at),
                source=SOURCE,
                billable=line.billable,
            )
            assert given == line.event_id, "the id follows from the task"
        elif line.reason in POISON_BYTES:
            value = POISON_BYTES[Reason(line.reason)](self._codec.encode(event_to_record(_event_of(line))))
            self._produce(value, line.client_id.encode(), partition=-1)
        else:
            # Behind the event it contradicts, and not judged on its way.
            self._usage.forward(_event_of(line), lambda outcome: self._note(outcome, DeliveryFailed))

    def _produce(self, value: bytes, key: bytes, partition: int) -> None:
        self._raw.produce(
            USAGE_EVENTS, value, key, partition, on_delivery=lambda error, _: self._note(error, KafkaError)
        )

    def _note(self, outcome: object, failure: type) -> None:
        if isinstance(outcome, failure):
            self._failed.append(outcome)


class Stream:
    """Publishes in the background, spread over the time that the kills take."""

    def __init__(self, publisher: Publisher, events: int, seconds_left: Callable[[], float]) -> None:
        self.published = Counter[str]()
        self._publisher, self._events, self._seconds_left = publisher, events, seconds_left
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._publish)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait until all is published; on an error don't."""
        if kind is not None:
            self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _publish(self) -> None:
        try:
            while (left := self._events - self.published[EVENT]) > 0 and not self._stop.wait(TICK_S):
                # There is something left for as long as somebody is to be killed: the steps of a flush with
                # rows are reached by nobody without events.
                ticks = max(TAIL_S, self._seconds_left()) / TICK_S
                self.published += self._publisher.publish(min(left, 1 + int(left / ticks)))
            self._publisher.flush()
        except Exception as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error


def _event_of(line: Line) -> UsageEvent:
    return UsageEvent(
        event_id=line.event_id,
        client_id=line.client_id,
        correlation_id=line.correlation_id,
        sku=line.sku,
        credits_micro=line.micro,
        occurred_at=line.occurred_at,
        source=SOURCE,
        billable=line.billable,
    )
