"""From usage records written down to answers written down: which are attempted now, and what came of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Protocol

from meterline.billing.clock import Clock
from meterline.billing.outcomes import Answer, Outcome
from meterline.billing.queue import SendQueue
from meterline.billing.state import BillingState
from meterline.billing.switches import Switch, Switches
from meterline.domain.account_books import AccountBooks
from meterline.domain.billing import INVOICE_GRACE_MS, reason_not_to_send
from meterline.domain.usage_records import RecordState, UsageRecord
from meterline.errors import PartitionHalted
from meterline.logs import get_logger
from meterline.streaming.steps import Step, reached

__all__ = ["Outbound", "Sender"]

BACKOFF_MS_MIN = 500
BACKOFF_MS_MAX = 60_000
"""Stripe's own advice is exponential; a minute keeps the rows of a long outage few and the delay after it
short."""
BUSY_MS = 100
"""Another partition has a request of the same customer and meter under way: about one answer's time."""
PAUSED_MS = 5_000
"""How soon a client whose pause ended is noticed."""

log = get_logger(__name__)


class Sender(Protocol):
    """What is needed of `send.StripeSender`."""

    def own(self, partition: int) -> None:
        """Requests of this partition will be made; its part of the account's limit is ours."""

    def disown(self, partition: int) -> None:
        """No more."""

    def room(self) -> int:
        """How many requests may be reserved now."""

    def reserve(self, lane: tuple[str, str]) -> bool:
        """Reserve one; False: the lane is busy."""

    def release(self, lane: tuple[str, str]) -> None:
        """Give a reservation back."""

    async def send(self, record: UsageRecord, committed_at: float) -> Outcome:
        """One request."""


class Outbound:
    """Sends the usage records of one partition.

    `plan` marks attempts in the state, the caller commits them, `start` sends them, and a later `settle` puts
    the answers into the state. So before the first byte goes out, the attempt and its time are durable.
    """

    def __init__(
        self,
        state: BillingState,
        books: AccountBooks,
        *,
        switches: Switches,
        sender: Sender,
        clock: Clock,
        invoice_grace_ms: int = INVOICE_GRACE_MS,
    ) -> None:
        self._state = state
        self._books = books
        self._switches = switches
        self._sender = sender
        self._clock = clock
        self._invoice_grace_ms = invoice_grace_ms
        self._queue = SendQueue()
        self._failures: dict[str, int] = {}
        self._reserved: set[tuple[str, str]] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._answers: list[tuple[UsageRecord, Outcome]] = []
        self._broken: BaseException | None = None
        sender.own(state.partition)
        for record in state.records.values():
            if not record.held_reason:
                self.push(record)

    def push(self, record: UsageRecord, not_before_ms: int = 0) -> None:
        """Let a record wait for its request."""
        self._queue.push(record.lane, record.identifier, not_before_ms)

    def plan(self) -> list[UsageRecord]:
        """Mark as many attempts as may be made right now: one commit for all of them."""
        now_ms = self._clock.now_ms()
        attempts: list[UsageRecord] = []
        room = self._sender.room()
        while len(attempts) < room and (taken := self._queue.take(now_ms)) is not None:
            lane, identifier = taken
            record = self._state.open_record(identifier)
            if record is None or record.held_reason:  # settled, or held, while it waited
                self._queue.free(lane)
                continue
            switch = self._switches.of(record.client_id)
            if reason := reason_not_to_send(record, now_ms, self._invoice_grace_ms):
                self._queue.free(lane)
                self._hold(record, reason, now_ms)
            elif switch is Switch.SHADOW and not record.attempted:
                self._queue.free(lane)
                self._books.shadow(record, now_ms)
            elif switch is not Switch.ON:
                self._queue.free(lane)
                self.push(record, now_ms + PAUSED_MS)
            elif not self._sender.reserve(lane):
                self._queue.free(lane)
                self.push(record, now_ms + BUSY_MS)
            else:
                self._reserved.add(lane)
                attempts.append(self._books.attempt(record, now_ms))
        return attempts

    def start(self, attempts: Sequence[UsageRecord], committed_at: float) -> None:
        """Send what was planned, now that it is committed and stands in the ledger."""
        for record in attempts:
            self._reserved.discard(record.lane)
            call = asyncio.create_task(self._call(record, committed_at))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    def settle(self) -> None:
        """Put the answers that came since the last time into the state.

        Raises:
            PartitionHalted: Stripe says that a request differs from the one first sent under its key.
        """
        if self._broken is not None:
            raise self._broken
        answers, self._answers = self._answers, []
        now_ms = self._clock.now_ms()
        for record, outcome in answers:
            self._queue.free(record.lane)
            self._settle(record, outcome, now_ms)

    def close(self) -> None:
        """The partition is lost: requests that wait are not made, answers to the others not heard."""
        for lane in self._reserved:
            self._sender.release(lane)
        self._reserved.clear()
        for call in self._calls:
            call.cancel()
        self._sender.disown(self._state.partition)

    async def _call(self, record: UsageRecord, committed_at: float) -> None:
        try:
            outcome = await self._sender.send(record, committed_at)
        except Exception as error:  # noqa: BLE001 - raised again by the next flush, which ends the process
            self._broken = error
        else:
            reached(Step.STRIPE_ANSWERED)
            self._answers.append((record, outcome))

    def _settle(self, record: UsageRecord, outcome: Outcome, now_ms: int) -> None:
        answer = outcome.answer
        if answer is Answer.NOT_SENT:
            self.push(record)
            return
        if answer is Answer.MUTATED:
            raise PartitionHalted(
                f"usage record {record.identifier} differs from what was first sent under its idempotency "
                f"key {record.idempotency_key}: {outcome.detail}"
            )
        reason = answer.value if outcome.detail else ""
        facts = {"request_id": outcome.request_id, "detail": outcome.detail, "reason": reason}
        if answer in {Answer.ACCEPTED, Answer.DUPLICATE}:
            self._failures.pop(record.identifier, None)
            self._books.landed(record, RecordState(answer.value), now_ms, **facts)
        elif answer is Answer.REFUSED:
            self._failures.pop(record.identifier, None)
            self._books.refused(record, now_ms, **facts)
            log.error(
                "Stripe refused a usage record; it is held",
                identifier=record.identifier,
                client_id=record.client_id,
                detail=outcome.detail,
            )
        else:
            again = self._books.unanswered(record, now_ms, new_key=outcome.new_key, **facts)
            if again is not None:
                self.push(again, now_ms + self._backoff_ms(record.identifier))

    def _backoff_ms(self, identifier: str) -> int:
        failures = self._failures[identifier] = self._failures.get(identifier, 0) + 1
        longest = min(BACKOFF_MS_MIN * 2 ** min(failures, 10), BACKOFF_MS_MAX)
        return int(longest * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, no secret

    def _hold(self, record: UsageRecord, reason: str, now_ms: int) -> None:
        self._books.hold(record, reason, now_ms)
        log.error(
            "usage record held",
            identifier=record.identifier,
            client_id=record.client_id,
            reason=reason,
            state=record.state.value,
        )
