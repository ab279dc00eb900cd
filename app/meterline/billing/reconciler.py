"""Money in flight: days against Stripe's summaries, accounts against their invoices.

Questions run beside the flushes; what their answers mean is decided in a flush, under its commit, by the
rules of `domain.account_books`, which check once more whether the moment is right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from meterline.billing.clock import Clock
from meterline.billing.state import BillingState
from meterline.billing.stripe_reads import Invoice, Reads
from meterline.billing.switches import Clients
from meterline.domain.account_books import About, AccountBooks, Comparison, MeterTerms, Step, day_bounds
from meterline.domain.accounts import AccountKey
from meterline.domain.billing import DAY_MS, INVOICE_GRACE_MS_MAX
from meterline.domain.clients import period_of
from meterline.domain.usage_records import UsageRecord
from meterline.errors import RetryLater
from meterline.logs import get_logger

__all__ = ["Reconciler"]

MINUTE_MS = 60_000
LOOK_INTERVAL_MS = MINUTE_MS
"""How often the accounts are looked through. Comparisons wait for hours; only the close wants to be soon."""
QUESTIONS_PER_LOOK_MAX = 200
"""A look asks one question after the other, at Stripe's 100 ms or so each: well within LOOK_INTERVAL_MS."""
INVOICE_AGAIN_MS = 10 * MINUTE_MS
"""An invoice that isn't final is asked for again so much later."""
SUBSCRIPTION_AGAIN_MS = 6 * 60 * MINUTE_MS
"""A subscription that doesn't fit is looked at again so much later."""
NO_INVOICE_MS = INVOICE_GRACE_MS_MAX + DAY_MS
"""So long after a period's end its invoice must exist."""
CLOSED_FOR_MS = 40 * DAY_MS
"""A closed account is remembered longer than anything that names its period can come from Stripe."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Summary:
    key: AccountKey
    day: int
    units: int


@dataclass(frozen=True, slots=True)
class _Line:
    key: AccountKey
    invoice: Invoice | None


@dataclass(frozen=True, slots=True)
class _Subscription:
    key: AccountKey
    problem: str


class Reconciler:
    """Compares and closes the accounts of one partition."""

    def __init__(
        self,
        state: BillingState,
        books: AccountBooks,
        *,
        clients: Clients,
        reads: Reads,
        clock: Clock,
        meters: Mapping[str, MeterTerms],
    ) -> None:
        self._state = state
        self._books = books
        self._clients = clients
        self._reads = reads
        self._clock = clock
        self._meters = meters
        self._look_at = 0
        self._not_before: dict[AccountKey, int] = {}
        self._checked: set[AccountKey] = set()
        self._asking: asyncio.Task[None] | None = None
        self._answers: list[Any] = []
        self._broken: BaseException | None = None

    def start(self) -> None:
        """Ask what is to be asked now, if nothing is being asked."""
        now_ms = self._clock.now_ms()
        if now_ms < self._look_at or self._asking is not None:
            return
        self._look_at = now_ms + LOOK_INTERVAL_MS
        questions = self._questions(now_ms)
        if questions:
            self._asking = asyncio.create_task(self._ask(questions))

    def settle(self) -> list[UsageRecord]:
        """Put the answers into the state.

        Returns:
            Records that were made, none of them sent.
        """
        if self._broken is not None:
            raise self._broken
        answers, self._answers = self._answers, []
        now_ms = self._clock.now_ms()
        made = [self._settled(answer, now_ms) for answer in answers]
        return [record for record in made if record is not None]

    def close(self) -> None:
        """The partition is lost."""
        if self._asking is not None:
            self._asking.cancel()

    def resolve(self, key: AccountKey, units: int, now_ms: int, why: str) -> UsageRecord | None:
        """A person says what the invoice charges: close the account with it."""
        return self._close(key, Invoice("", units), now_ms, why)

    # -- what to ask

    def _questions(self, now_ms: int) -> list[tuple[AccountKey, int | None]]:
        """Days to compare, and accounts (no day) whose invoice or subscription is asked for."""
        questions: list[tuple[AccountKey, int | None]] = []
        for key, account in list(self._state.accounts.items()):
            if account.closed:
                if now_ms > key.period_end + CLOSED_FOR_MS:
                    self._state.drop_account(key)
                    self._checked.discard(key)
                continue
            if len(questions) >= QUESTIONS_PER_LOOK_MAX:
                break
            ended = key.period_end <= now_ms
            unchecked = key not in self._checked and key.period_start <= now_ms
            if (ended or unchecked) and now_ms >= self._not_before.get(key, 0):
                questions.append((key, None))
            if self._on_the_minute(key):
                unsure = self._state.unsure.get(key, ())
                questions += [(key, day) for day in unsure if self._books.needs_look(key, day, now_ms)]
        return questions

    @staticmethod
    def _on_the_minute(key: AccountKey) -> bool:
        """Stripe sums up whole minutes: a period that begins within one is left to its invoice."""
        return key.period_start % MINUTE_MS == 0 and key.period_end % MINUTE_MS == 0

    async def _ask(self, questions: list[tuple[AccountKey, int | None]]) -> None:
        try:
            for key, day in questions:
                try:
                    self._answers.append(await self._answer(key, day))
                except RetryLater as error:
                    log.warning("Stripe could not be asked", client_id=key.client_id, error=str(error))
                    return
        except Exception as error:  # noqa: BLE001 - raised again by the next flush, which ends the process
            self._broken = error
        finally:
            self._asking = None

    async def _answer(self, key: AccountKey, day: int | None) -> _Summary | _Line | _Subscription:
        event_name = self._meters[key.meter].event_name
        if day is not None:
            start, end = day_bounds(key, day)
            return _Summary(key, day, await self._reads.summary(key, event_name, start, end))
        if key.period_end <= self._clock.now_ms():
            return _Line(key, await self._reads.invoice(key, event_name))
        return _Subscription(key, await self._reads.subscription_problem(key, event_name))

    # -- what an answer means

    def _settled(self, answer: _Summary | _Line | _Subscription, now_ms: int) -> UsageRecord | None:
        if isinstance(answer, _Summary):
            return self._compare(answer, now_ms)
        key = answer.key
        if isinstance(answer, _Subscription):
            if not answer.problem:
                self._checked.add(key)
            self._not_before[key] = min(now_ms + SUBSCRIPTION_AGAIN_MS, key.period_end)
            self._report(key, answer.problem, now_ms)
            return None
        self._not_before[key] = now_ms + INVOICE_AGAIN_MS
        invoice = answer.invoice
        if problem := self._problem_of(key, invoice, now_ms):
            self._report(key, problem, now_ms)
        elif invoice is not None and invoice.units is not None and self._books.may_close(key, now_ms):
            return self._close(key, invoice, now_ms, invoice.invoice_id)
        return None

    def _problem_of(self, key: AccountKey, invoice: Invoice | None, now_ms: int) -> str:
        """Why an account can't be closed by itself; empty while it can, or may be later."""
        if invoice is None:
            return "no_invoice" if now_ms >= key.period_end + NO_INVOICE_MS else ""
        if invoice.units is not None and self._books.foreign_on_invoice(key, invoice.units):
            return "foreign_usage"
        return invoice.problem

    def _compare(self, answer: _Summary, now_ms: int) -> UsageRecord | None:
        what, record = self._books.compare(answer.key, answer.day, answer.units, now_ms)
        if what is Comparison.SETTLED:
            log.warning(
                "a day was settled against Stripe's summary",
                client_id=answer.key.client_id,
                day=answer.day,
                summary=answer.units,
                missing=record.value if record else 0,
            )
        elif what is Comparison.FOREIGN:
            log.error(
                "Stripe's summary shows more than was ever sent: somebody else feeds the meter",
                client_id=answer.key.client_id,
                day=answer.day,
                summary=answer.units,
            )
        return record

    def _close(self, key: AccountKey, invoice: Invoice, now_ms: int, why: str) -> UsageRecord | None:
        client = self._clients.get(key.client_id)
        if client is None:
            self._report(key, "no_client", now_ms)
            return None
        period = period_of(client, now_ms)
        customer = client.stripe_customer_id or key.customer
        current = replace(key, period_start=period.start, period_end=period.end, customer=customer)
        if current == key or self._state.account(current).closed:
            return None
        self._report(key, "", now_ms)
        carry, record = self._books.close(key, invoice.units or 0, current, now_ms, why)
        self._not_before.pop(key, None)
        log.info(
            "account closed against its invoice",
            client_id=key.client_id,
            meter=key.meter,
            units=invoice.units,
            carried_micro=carry.credits_micro,
        )
        return record

    def _report(self, key: AccountKey, problem: str, now_ms: int) -> None:
        """List an account with its problem, once, and take it off the list when it is gone."""
        account = self._state.account(key)
        if account.problem == problem:
            return
        self._state.set_account(key, replace(account, problem=problem))
        kind, reason = ("held", problem) if problem else ("released", account.problem)
        self._state.add_step(Step(kind, key, About.account(key), state=kind, reason=reason), now_ms)
        log.warning("account reported", client_id=key.client_id, meter=key.meter, state=kind, reason=reason)
