"""From usage records written down to answers written down: which are attempted now, and what came of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from meterline.billing.intake import Clients
from meterline.billing.outcomes import Answer, Outcome
from meterline.billing.queue import SendQueue
from meterline.billing.rows import record_row
from meterline.billing.state import BillingState
from meterline.domain.billing import reason_not_to_send
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
        self, state: BillingState, clients: Clients, sender: Sender, clock_ms: Callable[[], int]
    ) -> None:
        self._state = state
        self._clients = clients
        self._sender = sender
        self._clock_ms = clock_ms
        self._queue = SendQueue()
        self._failures: dict[str, int] = {}
        self._reserved: set[tuple[str, str]] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._answers: list[tuple[UsageRecord, Outcome]] = []
        self._broken: BaseException | None = None
        for record in state.records.values():
            if not record.held_reason:
                self.push(record)

    def push(self, record: UsageRecord, not_before_ms: int = 0) -> None:
        """Let a record wait for its request."""
        self._queue.push(record.lane, record.identifier, not_before_ms)

    def plan(self) -> list[UsageRecord]:
        """Mark as many attempts as may be made right now: one commit for all of them."""
        now_ms = self._clock_ms()
        attempts: list[UsageRecord] = []
        room = self._sender.room()
        while len(attempts) < room and (taken := self._queue.take(now_ms)) is not None:
            lane, identifier = taken
            record = self._state.records[identifier]
            if reason := reason_not_to_send(record, now_ms):
                self._queue.free(lane)
                self._hold(record, reason, now_ms)
            elif (client := self._clients.get(record.client_id)) is not None and client.sending_paused:
                self._queue.free(lane)
                self.push(record, now_ms + PAUSED_MS)
            elif not self._sender.reserve(lane):
                self._queue.free(lane)
                self.push(record, now_ms + BUSY_MS)
            else:
                self._reserved.add(lane)
                first = record.first_attempt_at if record.first_attempt_at is not None else now_ms
                record = replace(record, state=RecordState.UNKNOWN, first_attempt_at=first)
                self._state.set_record(record)
                self._state.add_row(record_row("attempt", now_ms, record))
                attempts.append(record)
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
        now_ms = self._clock_ms()
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
        if answer in {Answer.ACCEPTED, Answer.DUPLICATE}:
            done = replace(record, state=RecordState(answer.value))
            self._state.drop_record(record.identifier)
            self._failures.pop(record.identifier, None)
            self._add_outcome(done, outcome, now_ms)
        elif answer is Answer.REFUSED:
            refused = replace(record, state=RecordState.REFUSED, held_reason="refused")
            self._state.set_record(refused)
            self._failures.pop(record.identifier, None)
            self._add_outcome(refused, outcome, now_ms)
            log.error(
                "Stripe refused a usage record; it is held",
                identifier=record.identifier,
                client_id=record.client_id,
                detail=outcome.detail,
            )
        else:
            self._add_outcome(record, outcome, now_ms)
            if outcome.new_key:
                record = replace(record, attempt_key=record.attempt_key + 1)
                self._state.set_record(record)
            self.push(record, now_ms + self._backoff_ms(record.identifier))

    def _backoff_ms(self, identifier: str) -> int:
        failures = self._failures[identifier] = self._failures.get(identifier, 0) + 1
        longest = min(BACKOFF_MS_MIN * 2 ** min(failures, 10), BACKOFF_MS_MAX)
        return int(longest * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, no secret

    def _add_outcome(self, record: UsageRecord, outcome: Outcome, now_ms: int) -> None:
        self._state.add_row(
            record_row(
                "outcome",
                now_ms,
                record,
                reason=record.held_reason or (outcome.answer.value if outcome.detail else ""),
                request_id=outcome.request_id,
                detail=outcome.detail,
            )
        )

    def _hold(self, record: UsageRecord, reason: str, now_ms: int) -> None:
        held = replace(record, held_reason=reason)
        self._state.set_record(held)
        self._state.add_row(record_row("held", now_ms, held, state="held"))
        log.error(
            "usage record held",
            identifier=record.identifier,
            client_id=record.client_id,
            reason=reason,
            state=record.state.value,
        )
