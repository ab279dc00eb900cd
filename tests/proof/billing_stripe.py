"""Stripe's side of the proof: customers with subscriptions, and what the sandbox does to requests, when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from tests.proof.billing_books import Counted, Period
from tests.sandbox_account import SandboxClient

from meterline.clients import ClientRegistry
from meterline.domain.clients import Client, PeriodUnit
from meterline.settings import Settings

__all__ = ["Stripe", "periods_from"]

HOUR_MS = 3_600_000
PERIODS = 3
TAKES_MS = 50 * 60_000
"""An invoice is final an hour after its period; ten minutes before, nothing is sent for it any more."""
EVENT_NAME = "meterline_credits"
REGISTERED_AT_ONCE = 16
ALWAYS = {
    "drop_before_commit": 0.01,
    "drop_after_commit": 0.02,
    "truncate": 0.02,
    "error_500_before_commit": 0.01,
    "error_500_after_commit": 0.02,
    "slow": 0.01,
    "conflict_409": 0.01,
    "rate_limit_429": 0.01,
    "lock_timeout_429": 0.01,
}
SLOW_S = 0.2
REJECTED_SHARE = 0.02
REJECTED_AFTER_H, REJECTED_BEFORE_H = 6, 48
"""Of a period: later a rejection could not be noticed, compared and made anew before the invoice is final."""


def periods_from(now: datetime, unit: PeriodUnit) -> list[Period]:
    """Three whole periods to come, and the one after them."""
    start = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    starts = []
    while len(starts) < PERIODS + 2:
        start += timedelta(days=1)
        if start.day == 1 if unit is PeriodUnit.MONTH else start.weekday() == 0:
            starts.append(int(start.timestamp()) * 1000)
    return [Period(start, end, end + TAKES_MS) for start, end in pairwise(starts)]


class Stripe:
    """The sandbox, as the proof sets it up and troubles it."""

    def __init__(self, sandbox: SandboxClient, seed: int) -> None:
        self.sandbox = sandbox
        self._seed = seed
        self._ended = Counter[str]()
        self._rejects = self._was_away = False

    def subscribe(self, clients: Iterable[str], unit: PeriodUnit, settings: Settings) -> dict[str, str]:
        """A customer with a subscription for each client, whose period begins now; both are registered."""
        made = self.sandbox.made
        meter = made(
            "/v1/billing/meters",
            {
                "display_name": "Credits",
                "event_name": EVENT_NAME,
                "default_aggregation[formula]": "sum",
            },
        )["id"]
        price = self.sandbox.metered_price(meter, interval=unit.value)
        customers = dict[str, str]()
        for client in clients:
            customers[client] = made("/v1/customers", {"name": client})["id"]
            made("/v1/subscriptions", {"customer": customers[client], "items[0][price]": price})
        anchor = 4 * 24 * HOUR_MS if unit is PeriodUnit.WEEK else 0
        registered = [
            Client(client, customer, unit, anchor, updated_by="proof")
            for client, customer in customers.items()
        ]
        with ThreadPoolExecutor(REGISTERED_AT_ONCE) as threads:  # each waits for Kafka most of its time
            list(threads.map(ClientRegistry(settings).put, registered))
        self._usual()
        return customers

    def as_scripted(self, now_ms: int, periods: Sequence[Period], outage: tuple[int, int]) -> None:
        """What changes at this hour."""
        period = next(period for period in periods if period.start <= now_ms < period.end)
        is_away = outage[0] <= now_ms < outage[1]
        may_reject = (
            period is not periods[-1]
            and period.start + REJECTED_AFTER_H * HOUR_MS <= now_ms < period.end - REJECTED_BEFORE_H * HOUR_MS
        )
        if is_away and not self._was_away:
            self._begin(action="down", path="^/v[12]/", method="", for_s=(outage[1] - now_ms) // 1000)
        elif (self._was_away and not is_away) or (self._rejects and not may_reject):
            self._usual()
        if may_reject and not self._rejects:
            self._fault("reject_async", REJECTED_SHARE)
        self._was_away, self._rejects = is_away, may_reject

    def count_again(self, one: Counted) -> None:
        """A meter event under an identifier that Stripe has forgotten."""
        params = {
            "event_name": EVENT_NAME,
            "payload[stripe_customer_id]": one.customer,
            "payload[value]": str(one.value),
            "identifier": one.identifier,
            "timestamp": one.timestamp_s,
        }
        self._begin()
        self.sandbox.made("/v1/billing/meter_events", params)

    def applied(self) -> Counter[str]:
        """How often each fault was."""
        counts = Counter(dict.fromkeys([*ALWAYS, "reject_async", "down"], 0))
        counts.update(self._ended)
        counts.update(self._now())
        return counts

    def _now(self) -> Counter[str]:
        counts = Counter[str]()
        for fault in self.sandbox.get("/_sandbox/faults").body["data"]:
            counts[fault["action"]] += fault["applied"]
        return counts

    def _usual(self) -> None:
        self._begin()
        for action, share in ALWAYS.items():
            self._fault(action, share)

    def _begin(self, **fault: object) -> None:
        """End all faults, and begin another one."""
        self._ended += self._now()
        self.sandbox.request("DELETE", "/_sandbox/faults")
        if fault:
            self.sandbox.control("faults", **fault)

    def _fault(self, action: str, share: float) -> None:
        """Once soon, then by chance."""
        self._seed += 1
        more = {"delay_s": SLOW_S} if action == "slow" else {}
        self.sandbox.control("faults", action=action, skip=1, count=1, **more)
        self.sandbox.control("faults", action=action, probability=share, seed=self._seed, **more)
