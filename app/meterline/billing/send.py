"""Requests to Stripe: at their pace, one per customer and meter, never by a stale owner."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import stripe

from meterline.billing.clock import Clock
from meterline.billing.outcomes import ANSWERLESS, Answer, Outcome, classify
from meterline.billing.pace import Pace
from meterline.domain.usage_records import UsageRecord
from meterline.logs import get_logger
from meterline.metrics import STRIPE_REQUESTS, STRIPE_SENDING_STOPPED
from meterline.settings import StripeSettings

__all__ = ["CUSTOMER_KEY", "VALUE_KEY", "StripeSender", "stripe_client"]

THREADS = 32
"""Requests at the same time: at Stripe's 100 ms or so an answer this is 300 a second, and a thread costs
little while it waits. In the sandbox and in test mode the rate is the limit, not this."""
AHEAD_MAX = 500
"""Requests whose attempt is committed and that have no answer: what the threads do in about two seconds, so
that few of them outlive FRESH_S."""
FRESH_S = 5.0
"""No request later than this after the commit that announced it: a stalled owner, whose partition somebody
else has by now, must not send. Kafka needs longer than this to give the partition away."""

CUSTOMER_KEY = "stripe_customer_id"
VALUE_KEY = "value"
"""Keys in a meter event's payload: Stripe's defaults."""

log = get_logger(__name__)


class _Hearing(stripe.RequestsClient):
    """Tells the clock what time it is at Stripe, with every answer; with a pace, waits for its turn first."""

    def __init__(self, clock: Clock, timeout_s: float, pace: Pace | None) -> None:
        super().__init__(timeout=timeout_s)
        self._billing_clock = clock
        self._pace = pace

    def request(  # type: ignore[override]  # of RequestsClient, which its own base declares otherwise
        self, method: str, url: str, headers: Mapping[str, str] | None, post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        if self._pace is not None:
            self._pace.wait()
        answer = super().request(method, url, headers, post_data)
        if date := answer[2].get("Date"):
            self._billing_clock.heard(date)
        return answer


def stripe_client(settings: StripeSettings, clock: Clock, pace: Pace | None = None) -> stripe.StripeClient:
    """A client whose retries are ours: it makes one request, whatever the answer.

    Args:
        pace: which each request waits for; None: whoever makes them has planned them.
    """
    return stripe.StripeClient(
        settings.api_key.get_secret_value(),
        base_addresses={"api": settings.api_base} if settings.api_base else None,
        max_network_retries=0,
        http_client=_Hearing(clock, settings.timeout_s, pace),
    )


class StripeSender:
    """Sends usage records for all partitions of a worker.

    Who wants to send reserves first (`room`, `reserve`), commits the attempt, and then calls `send`; what was
    reserved and isn't sent is given back with `release`.

    Attributes:
        stopped: why nothing is sent any more; empty while it works. A restart tries again.
    """

    def __init__(
        self,
        client: stripe.StripeClient,
        pace: Pace,
        *,
        clock: Clock,
        paused: bool = False,
    ) -> None:
        self.stopped = ""
        self._client = client
        self._pace = pace
        self._paused = paused
        self._clock = clock
        self._lanes: set[tuple[str, str]] = set()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="stripe")
        STRIPE_SENDING_STOPPED.set(0)

    def own(self, partition: int) -> None:
        """The worker sends for this partition, too, and has its part of the account's limit."""
        self._pace.own(partition)

    def disown(self, partition: int) -> None:
        """Somebody else does."""
        self._pace.disown(partition)

    def room(self) -> int:
        """How many requests may be reserved now."""
        if self.stopped or self._paused:
            return 0
        return max(0, min(self._pace.room(), AHEAD_MAX - len(self._lanes)))

    def reserve(self, lane: tuple[str, str]) -> bool:
        """Reserve one of the `room`; False: a request of this customer and meter is under way."""
        if lane in self._lanes:
            return False
        self._lanes.add(lane)
        self._pace.plan()
        return True

    def release(self, lane: tuple[str, str]) -> None:
        """Give a reservation back that will not be used."""
        self._lanes.discard(lane)
        self._pace.unplan()

    async def send(self, record: UsageRecord, committed_at: float) -> Outcome:
        """One request, when its turn has come. Ends the reservation of its lane, whoever awaits the answer.

        Args:
            record: as it was committed.
            committed_at: `Clock.boot_s()` right before the commit of this attempt.
        """
        try:
            await self._pace.departure()
        except asyncio.CancelledError:
            self._lanes.discard(record.lane)
            raise
        call = self._threads.submit(self._request, record, committed_at)
        call.add_done_callback(lambda _: self._lanes.discard(record.lane))
        outcome = await asyncio.wrap_future(call)
        STRIPE_REQUESTS.labels(outcome.answer.value).inc()
        if outcome.answer is Answer.STOP and not self.stopped:
            self.stopped = outcome.detail
            STRIPE_SENDING_STOPPED.set(1)
            log.error(
                "Stripe refuses the API key; sending stops, windows are still taken in",
                detail=outcome.detail,
                remedy="correct METERLINE_STRIPE__API_KEY and restart the billing worker",
            )
        return outcome

    def close(self) -> None:
        """Start no more requests; those under way end by their own time-out."""
        self.stopped = self.stopped or "the worker ends"
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _request(self, record: UsageRecord, committed_at: float) -> Outcome:
        if self._clock.boot_s() - committed_at > FRESH_S:
            return Outcome(Answer.NOT_SENT, f"more than {FRESH_S:.0f} s since the commit of the attempt")
        try:
            event = self._client.v1.billing.meter_events.create(
                {
                    "event_name": record.event_name,
                    "identifier": record.identifier,
                    "timestamp": record.event_timestamp,
                    "payload": {CUSTOMER_KEY: record.customer, VALUE_KEY: str(record.value)},
                },
                {"idempotency_key": record.idempotency_key, "max_network_retries": 0},
            )
        except ANSWERLESS as error:
            return classify(error, record.identifier)
        if getattr(event, "identifier", None) != record.identifier:
            return Outcome(Answer.UNKNOWN, "200, but the answer is not our meter event")
        response = event.last_response
        return Outcome(Answer.ACCEPTED, request_id=(response.request_id if response else None) or "")
