"""`Task`: one attempt at one piece of work, from its reservation to its durable usage."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from meterline.domain.encoding import hash_hex
from meterline.domain.events import ID_BYTES_MAX, UsageEvent
from meterline.errors import MeterlineError, UserError
from meterline.producer.errors import InvalidUsage
from meterline.producer.events import build_event
from meterline.producer.usage import RECORD_BYTES_MAX
from meterline.quota import CreditsExhausted
from meterline.task.desk import Credits, Desk
from meterline.task.errors import SpoolFailed
from meterline.task.spool import APPEND_BYTES_MAX

__all__ = ["Task"]

ATTEMPT_BYTES = 8
"""Random: no two attempts of one task ever share a reservation."""
TASK_BYTES_MAX = APPEND_BYTES_MAX // 2
"""All usage of one task: it is kept as a whole or not at all."""

log = logging.getLogger("meterline.task")


class Task:
    """To be entered with `async with`; made by `Meter.task`.

    Attributes:
        reservation_id: of this attempt.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        client_id: str,
        sku: str,
        credits: Credits,  # noqa: A002 - the domain's word
        correlation_id: str,
        attributes: Mapping[str, str] | None,
        source: str,
    ) -> None:
        self._desk = desk
        self._client_id, self._correlation_id, self._source = client_id, correlation_id, source
        self._credits = credits
        self.reservation_id = ""
        self._is_running = False
        self._lock = threading.Lock()
        """Guards the charges: `charge` comes from any thread."""
        self._charges: list[tuple[UsageEvent, bytes]] = []
        self._charged: set[str] = set()
        self._bytes = 0
        self._items: Counter[str] = Counter()
        self._on_success = {"sku": sku, "credits": credits, "attributes": attributes}

    def charge(
        self,
        *,
        sku: str,
        credits: Credits,  # noqa: A002 - the domain's word; nobody calls the interpreter's credits()
        item: int | None = None,
        occurred_at: datetime | None = None,
        attributes: Mapping[str, str] | None = None,
        billable: bool = True,
    ) -> str:
        """Cost that arose: billed also when the work fails after it. From any thread, at once.

        Args:
            item: tells apart charges of one SKU; None: counted from 0, which gives a re-run the same ids as
                long as it charges in the same order.
            occurred_at: with a time zone; None: now.
            attributes: texts for the receipt.
            billable: False: shown on the receipt, not billed.

        Returns:
            The event id.

        Raises:
            InvalidUsage: metering would refuse it, or this process charged other credits under this id.
                Nothing was charged.
            UserError: the task is not running.
        """
        with self._lock:
            if not self._is_running:
                raise UserError("charge() belongs inside the `with` block of its task")
            number = self._items[sku] if item is None and isinstance(sku, str) else item or 0
            event, record = self._checked(
                sku=sku,
                credits=credits,
                item=number,
                occurred_at=occurred_at,
                attributes=attributes,
                billable=billable,
            )
            if self._bytes + len(record) > TASK_BYTES_MAX:
                raise InvalidUsage(
                    f"this task's usage takes more than {TASK_BYTES_MAX} bytes; make several tasks of it"
                )
            self._desk.note(event)
            if event.event_id in self._charged:
                return event.event_id
            self._charged.add(event.event_id)
            self._bytes += len(record)
            self._items[sku] = max(self._items[sku], number + 1)
            self._charges.append((event, record))
        return event.event_id

    async def __aenter__(self) -> Self:
        desk = self._desk
        if desk.is_closed:
            raise UserError("this Meter is closed")
        if self.reservation_id:
            raise UserError("a task is entered once; make another one for another attempt")
        intended = self._event(**self._on_success)
        self.reservation_id = _new_reservation(self._client_id, self._correlation_id)
        if intended.attributes:  # all else together is small
            self._record(intended._replace(reservation_id=self.reservation_id))
        desk.require_sound()
        desk.kept.admit()
        try:
            await self._reserve()
        except BaseException:  # cancelled, too: its place is for others
            desk.kept.release()
            raise
        desk.holds.add(self.reservation_id, self._client_id)
        self._is_running = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_running = False
        try:
            if error is None and not self._charges:
                self._charge_intended()
        except BaseException:  # cancelled, too: what is held goes back
            await self._desk.see_through(self._void())
            raise
        if not self._charges:
            await self._desk.see_through(self._void())
            return
        try:
            await self._desk.see_through(self._keep())
        except SpoolFailed as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what went wrong first stays what is raised

    async def _reserve(self) -> None:
        try:
            await self._desk.buckets.reserve(
                self._client_id, self._credits, reservation_id=self.reservation_id, ttl_s=self._desk.ttl_s
            )
        except CreditsExhausted:
            raise
        except BaseException:  # cancelled, too
            # Redis may have granted it, and only the answer is missing. The work has not started.
            self._desk.leave_behind(self._void_quietly())
            raise

    def _charge_intended(self) -> None:
        event, record = self._checked(**self._on_success)
        self._desk.note(event)
        self._charges.append((event, record))

    async def _void(self) -> None:
        """Give the hold back: no usage was written anywhere."""
        self._desk.holds.drop(self.reservation_id)
        try:
            await self._void_quietly()
        finally:
            self._desk.kept.release()

    async def _void_quietly(self) -> None:
        try:
            await self._desk.buckets.void(self.reservation_id, client_id=self._client_id)
        except MeterlineError as error:
            # It ends by itself when the log has passed its deadline: nobody renews it any more.
            log.debug("hold %s was not voided: %s", self.reservation_id, error)

    async def _keep(self) -> None:
        """From here on the hold is never voided: the usage may be durable whatever we hear."""
        desk = self._desk
        desk.holds.lengthen(self.reservation_id)
        records = [record for _, record in self._charges]
        records[-1] = desk.records.closing(records[-1])
        try:
            await asyncio.wrap_future(desk.kept.append(records))
        except SpoolFailed:
            desk.holds.drop(self.reservation_id)
            for event, _ in self._charges:
                desk.forget(event)
            raise
        finally:
            desk.kept.release()

    def _checked(self, **words: Any) -> tuple[UsageEvent, bytes]:
        """An event that Kafka and metering will take, and its record.

        Raises:
            InvalidUsage: one of them would not.
        """
        event = self._event(**words)
        return event, self._record(event)

    def _event(self, **words: Any) -> UsageEvent:
        return build_event(
            client_id=self._client_id,
            correlation_id=self._correlation_id,
            source=self._source,
            reservation_id=self.reservation_id or None,
            now_ms=time.time_ns() // 1_000_000,
            **words,
        )

    def _record(self, event: UsageEvent) -> bytes:
        record = self._desk.records.encode(event)
        size = len(event.client_id.encode()) + len(record)
        if size > RECORD_BYTES_MAX:
            raise InvalidUsage(
                f"the event takes {size} bytes, more than the {RECORD_BYTES_MAX} of one record; shorten its "
                "attributes"
            )
        return record


def _new_reservation(client_id: str, correlation_id: str) -> str:
    """Task and attempt: a re-run never touches the hold of an older attempt."""
    attempt = secrets.token_hex(ATTEMPT_BYTES)
    if len(correlation_id.encode()) > ID_BYTES_MAX - len(attempt) - 1:
        correlation_id = hash_hex("meterline.reservation.1", client_id, correlation_id)
    return f"{correlation_id}:{attempt}"
