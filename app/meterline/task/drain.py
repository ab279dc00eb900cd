"""`Drainer`: brings spooled usage to Kafka, in order, for as long as that takes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from meterline.domain.events import UsageEvent
from meterline.errors import MeterlineError, RetryLater, WorkerMustExit
from meterline.producer.errors import DeliveryFailed
from meterline.producer.usage import Acknowledged
from meterline.task.errors import SpoolCorrupt, SpoolFailed
from meterline.task.lanes import EventProducer, Lane, Published, Sent, Ticket
from meterline.task.records import SpooledEvents
from meterline.task.slots import Slot, abandoned_slots
from meterline.task.spool import Spool

__all__ = ["Drainer"]

WINDOW_EVENTS_MAX = 10_000
"""On their way to Kafka at a time: a tenth of the producer's queue, so that it never blocks."""
WINDOW_BYTES_MAX = 16 * 1024 * 1024
"""A quarter of the producer's memory, as the spool counts."""
TICK_S = 0.2
MARK_S = 0.5
"""Longest time between an acknowledgement and the durable mark: what a crash publishes twice."""
LOOK_FOR_SLOTS_S = 5.0
TRY_AGAIN_S = 1.0
STOP_S = 0.5
"""For acknowledgements that are on their way; whoever wants to wait for all has waited before."""
SILENCE_S = 30.0
"""Without any acknowledgement so long, it is said in the log, again and again."""
FOUND_MAX = 100_000
"""Events left behind whose holds are renewed at once: a look at them takes a few seconds."""
UNSETTLED_MAX = 100_000
"""Acknowledged while nobody tells the topic's id: beyond, holds end by the log's clock instead."""

log = logging.getLogger("meterline.task")


class Drainer:
    """A thread that publishes what the spools hold, and says what was acknowledged.

    Kafka may be away for a minute or a day: the producer keeps trying and memory stays bounded. What it
    refuses is sent again until it takes it (a missing topic, a right not granted): nothing is skipped.

    Args:
        root: the directory with all slots; those that nobody holds are drained too.
        new_producer: makes one; called again when Kafka refuses the former for good.
        topic_id: the log's identity, None while unknown; never blocks.
        on_published: told of acknowledged events, from this thread.
        on_found: told of each event that was left behind, before it is published; from the thread that opens
            the drainer, or from this one.

    Attributes:
        failure: what ended the draining of the own spool.
    """

    def __init__(
        self,
        root: Path,
        *,
        bytes_max: int,
        new_producer: Callable[[], EventProducer],
        topic_id: Callable[[], str | None],
        on_published: Callable[[list[Published]], None],
        on_found: Callable[[UsageEvent], None],
    ) -> None:
        self._root, self._bytes_max = root, bytes_max
        self._new_producer = new_producer
        self._topic_id = topic_id
        self._on_published, self._on_found = on_published, on_found
        self._records = SpooledEvents()
        self._producer: EventProducer | None = None
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._outcomes: deque[tuple[Ticket, Acknowledged | DeliveryFailed]] = deque()
        self._again: deque[Ticket] = deque()
        self._again_at = 0.0
        self._flying = self._flying_bytes = 0
        self._unsettled: list[tuple[Ticket, Acknowledged]] = []
        self._reported: set[Path] = set()
        """Slots that can't be opened, each told once."""
        self._look_at = self._mark_at = 0.0
        self._heard_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="meterline-drainer", daemon=True)
        self.failure: BaseException | None = None
        self._lanes: list[Lane] = []

    def start(self, own: Spool) -> None:
        """Find what was left behind, in the own spool and in slots that nobody holds, and begin.

        Raises:
            SpoolCorrupt: something that was left behind can't be read.
        """
        try:
            self._add_lane(own, None)
            self._adopt(is_strict=True)
        except BaseException:  # whatever it was: the slot is for others
            self._release()
            raise
        self._thread.start()

    def wake(self) -> None:
        """There is more to read. From any thread."""
        self._wake.set()

    @property
    def is_idle(self) -> bool:
        """Whether all that was spooled is acknowledged and told."""
        lanes = list(self._lanes)
        return not self._unsettled and all(lane.spool.waiting_bytes == 0 for lane in lanes)

    def stop(self) -> None:
        """Stop soon; what is not acknowledged stays in the spool."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._wake.wait(TICK_S)
                self._wake.clear()
                self._turn()
            self._close_producer(STOP_S)
            self._take_outcomes()
            self._tell()
        except BaseException as error:  # told to the next task that begins or ends
            log.exception("the drainer ended; usage stays in the spool")
            self.failure = self.failure or error
            self._close_producer(0.0)
        finally:
            self._release()

    def _turn(self) -> None:
        now = time.monotonic()
        self._take_outcomes()
        if now >= self._look_at:
            self._look_at = now + LOOK_FOR_SLOTS_S
            self._adopt(is_strict=False)
        self._send(now)
        self._tell()
        if now >= self._mark_at:
            self._mark_at = now + MARK_S
            self._mark()
        if not self._flying:
            self._heard_at = now
        elif now - self._heard_at > SILENCE_S:
            self._heard_at = now
            log.warning("Kafka takes no usage; %d events wait in the spool or are on their way", self._flying)

    def _take_outcomes(self) -> None:
        while self._outcomes:
            ticket, outcome = self._outcomes.popleft()
            self._flying -= 1
            if isinstance(outcome, DeliveryFailed):
                if not self._stopping.is_set():
                    log.warning("Kafka refused usage; it is sent again: %s", outcome.events[0][1])
                self._again.append(ticket)
                self._again_at = time.monotonic() + TRY_AGAIN_S
                continue
            self._heard_at = time.monotonic()
            self._unsettled.append((ticket, outcome))
            lane, ticket.sent.left = ticket.lane, ticket.sent.left - 1
            while lane.sent and lane.sent[0].left == 0:
                done = lane.sent.popleft()
                self._flying_bytes -= done.size
                lane.spool.drained(done.end)

    def _send(self, now: float) -> None:
        """First what was refused, in its order and once nothing of it is on its way any more."""
        if self._again:
            if self._flying or now < self._again_at:
                return
            again, self._again = list(self._again), deque()
            for number, ticket in enumerate(again):
                if not self._forward(ticket):
                    self._again.extend(again[number + 1 :])
                    return
        for lane in self._lanes:
            while not lane.broken and self._has_window():
                if not self._send_frame(lane):
                    break

    def _has_window(self) -> bool:
        return self._flying < WINDOW_EVENTS_MAX and self._flying_bytes < WINDOW_BYTES_MAX and not self._again

    def _send_frame(self, lane: Lane) -> bool:
        """The next frame of a spool; False: there is none."""
        try:
            frame = lane.spool.read()
            if frame is None:
                return False
            events = [self._records.decode(record) for record in frame.records]
        except (SpoolCorrupt, OSError) as error:
            self._give_up(lane, error)
            return False
        sent = Sent(frame.end, frame.size, len(events))
        lane.sent.append(sent)
        self._flying_bytes += frame.size
        tickets = [Ticket(lane, sent, event, final) for event, final in events]
        for number, ticket in enumerate(tickets):
            if not self._forward(ticket):
                self._again.extend(tickets[number + 1 :])
                return False
        return True

    def _forward(self, ticket: Ticket) -> bool:
        """Hand one event to the producer; False: it waits for its next try."""
        try:
            if self._producer is None:
                self._producer = self._new_producer()
            self._producer.forward(ticket.event, partial(self._note, ticket))
        except (RetryLater, WorkerMustExit) as error:
            log.warning("usage can't be sent now; it is sent again: %s", error)
            self._again.append(ticket)
            self._again_at = time.monotonic() + TRY_AGAIN_S
            if isinstance(error, WorkerMustExit):
                self._close_producer(0.0)
            return False
        self._flying += 1
        return True

    def _note(self, ticket: Ticket, outcome: Acknowledged | DeliveryFailed) -> None:
        """From the producer's thread."""
        self._outcomes.append((ticket, outcome))
        self._wake.set()

    def _tell(self) -> None:
        if not self._unsettled:
            return
        topic_id = self._topic_id()
        if topic_id is None:
            del self._unsettled[:-UNSETTLED_MAX]
            return
        told = [
            Published(ticket.event, ticket.final, topic_id, place.partition, place.offset)
            for ticket, place in self._unsettled
        ]
        self._on_published(told)
        self._unsettled.clear()

    def _mark(self) -> None:
        for lane in list(self._lanes):
            try:
                lane.spool.mark()
            except OSError as error:
                log.warning("what is drained can't be marked in %s: %s", lane.spool.slot, error)
            if lane.slot is not None and not lane.broken and lane.spool.waiting_bytes == 0:
                lane.spool.close()
                lane.slot.release()
                self._lanes.remove(lane)
                log.info("drained what another process left in %s", lane.slot.path)

    def _adopt(self, *, is_strict: bool) -> None:
        for slot in abandoned_slots(self._root):
            try:
                self._add_lane(Spool(slot.path, self._bytes_max), slot)
            except (SpoolCorrupt, SpoolFailed) as error:
                slot.release()
                if is_strict:
                    raise
                if slot.path not in self._reported:
                    self._reported.add(slot.path)
                    log.error("usage was left where it can't be read: %s", error)  # noqa: TRY400 - the text says it all

    def _add_lane(self, spool: Spool, slot: Slot | None) -> None:
        found = 0
        while found < FOUND_MAX and (frame := spool.read()) is not None:
            found += len(frame.records)
            for record in frame.records:
                self._on_found(self._records.decode(record).event)
        spool.rewind()
        self._lanes.append(Lane(spool, slot))

    def _give_up(self, lane: Lane, error: Exception) -> None:
        lane.broken = True
        log.error("a spool can't be read; the rest of it is not published: %s", error)
        if lane.slot is None:
            self.failure = self.failure or error

    def _close_producer(self, timeout_s: float) -> None:
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            producer.close(timeout_s)
        except MeterlineError as error:
            log.debug("the producer was closed: %s", error)

    def _release(self) -> None:
        """The own spool is its owner's; the others go back."""
        for lane in self._lanes:
            if lane.slot is not None:
                lane.spool.close()
                lane.slot.release()
