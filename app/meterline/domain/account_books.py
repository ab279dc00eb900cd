"""The rules by which accounts move: one state machine, without IO or clock.

What happened comes in as an argument, what it means is written to a `Store`, and each advance and each change
of a record is a `Step` for the ledger. The rules, with the counterexample behind each, are those of the model
checks of billing; docs/adr/0017 says what was left open there.

    advance     an account absorbs credits; U moves, or not; the step is written always
    attempt     a request is about to be made: its time is written down before its first byte
    landed      Stripe has it: the value moves from the open record to its day
    notice      Stripe rejected something: the day becomes suspect, nothing moves
    compare     a day against Stripe's summary: confirmed, or settled and what is missing made anew
    close       an account against its own invoice: what is left is carried into the current account
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from meterline.domain.accounts import DAY_S, Account, AccountKey, Carry, Day, carry_of
from meterline.domain.billing import (
    ABSENCE_MS,
    INVOICE_GRACE_MS,
    INVOICE_MARGIN_MS,
    RESEND_MAX_MS,
    UNPROMPTED_ABSENCE_MS,
    event_timestamp,
    invoice_takes,
)
from meterline.domain.encoding import hash_hex
from meterline.domain.usage_records import RecordState, UsageRecord, usage_record_identifier
from meterline.domain.windows import WindowRef

__all__ = ["About", "AccountBooks", "Comparison", "MeterTerms", "Step", "Store", "Terms", "day_bounds"]


@dataclass(frozen=True, slots=True)
class MeterTerms:
    """A meter's name at Stripe, and the micro-credits of its unit. Neither ever changes."""

    event_name: str
    unit_micro: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What the partitions of a worker have in common.

    Attributes:
        invoice_grace_ms: how long after a period's end Stripe finalises its invoice.
    """

    installation_id: str
    map_version: int
    meters: Mapping[str, MeterTerms]
    invoice_grace_ms: int = INVOICE_GRACE_MS


@dataclass(frozen=True, slots=True)
class About:
    """What a step is about: the snapshot of a window, a day of an account, or an account that was closed."""

    window_id: str
    start: int
    end: int
    source_topic_id: str = ""
    source_partition: int = 0
    cutoff_offset: int = 0

    @classmethod
    def window(cls, ref: WindowRef, cutoff_offset: int) -> About:
        """One snapshot."""
        return cls(ref.window_id, ref.start, ref.end, ref.topic_id, ref.partition, cutoff_offset)

    @classmethod
    def day(cls, key: AccountKey, day: int) -> About:
        """As much of a UTC day as lies in the account's period."""
        return cls(hash_hex("meterline.account-day.1", key.name, day), *day_bounds(key, day))

    @classmethod
    def account(cls, key: AccountKey) -> About:
        """A whole account."""
        return cls(key.name, key.period_start, key.period_end)

    @classmethod
    def record(cls, record: UsageRecord) -> About:
        """What a record was made for."""
        return cls(
            record.window_id,
            record.window_start,
            record.window_end,
            record.source_topic_id,
            record.source_partition,
            record.cutoff_offset,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the ledger's log of billing.

    Attributes:
        credits_micro: by how much the account's credits changed; of a part of a carry its amount.
        value: units: of a record; of a comparison what the summary showed; of a close the invoice's quantity.
    """

    kind: str
    account: AccountKey
    about: About
    credits_micro: int = 0
    record: UsageRecord | None = None
    value: int = 0
    state: str = ""
    reason: str = ""
    detail: str = ""
    request_id: str = ""


class Store(Protocol):
    """Where the accounts of one partition stand. What is set is durable with the next commit."""

    def account(self, key: AccountKey) -> Account:
        """An account; one never set is empty."""

    def days(self, key: AccountKey) -> Mapping[int, Day]:
        """The days of an account on which anything was told."""

    def open_records(self, key: AccountKey) -> Collection[UsageRecord]:
        """Its records without a final outcome."""

    def open_record(self, identifier: str) -> UsageRecord | None:
        """One of them."""

    def set_account(self, key: AccountKey, account: Account) -> None:
        """Move an account."""

    def set_day(self, key: AccountKey, day: int, what: Day) -> None:
        """Move a day."""

    def drop_days(self, key: AccountKey) -> None:
        """An account was closed."""

    def set_record(self, record: UsageRecord) -> None:
        """Write an open record down, or move it on."""

    def drop_record(self, identifier: str) -> None:
        """It has its final outcome; it stands in the ledger from now on."""

    def add_step(self, step: Step, now_ms: int) -> None:
        """A row of the ledger."""


class Comparison(Enum):
    """What the comparison of a day with Stripe's summary came to."""

    TOO_EARLY = "too_early"
    CONFIRMED = "confirmed"
    SETTLED = "settled"
    FOREIGN = "foreign"
    """The summary shows more than this installation ever sent: somebody else feeds the meter."""


class AccountBooks:
    """The accounts of one partition."""

    def __init__(self, store: Store, terms: Terms) -> None:
        self._store = store
        self._terms = terms

    # -- usage

    def takes(self, key: AccountKey, now_ms: int) -> bool:
        """Whether usage absorbed now still reaches the account's own invoice."""
        within = invoice_takes(key.period_end, now_ms, self._terms.invoice_grace_ms)
        return within and not self._store.account(key).closed

    def advance(
        self, key: AccountKey, change_micro: int, about: About, now_ms: int, reason: str = ""
    ) -> UsageRecord | None:
        """Absorb credits. The step is written always: a remainder is as durable as what was sent.

        Returns:
            The new record, if U changed.
        """
        meter = self._terms.meters[key.meter]
        before = self._store.account(key)
        credits_micro, units = before.absorb(change_micro, meter.unit_micro)
        self._store.set_account(key, replace(before, credits_micro=credits_micro, units=units))
        value = units - before.units
        record = self._record(key, about, value, now_ms) if value else None
        self._store.add_step(Step("advance", key, about, change_micro, record, value, reason=reason), now_ms)
        if record is not None:
            self._write_down(record, now_ms)
        return record

    # -- sending

    def attempt(self, record: UsageRecord, now_ms: int) -> UsageRecord:
        """A request is about to be made; commit this before its first byte."""
        day = self._day(record)
        first = record.first_attempt_at
        if first is None:
            first = now_ms
            day = replace(day, attempted=day.attempted + max(0, record.value))
        record = replace(record, state=RecordState.UNKNOWN, first_attempt_at=first)
        self._store.set_day(record.account, record.day, replace(day, last_attempt_at=now_ms, confirmed=False))
        self._store.set_record(record)
        self._store.add_step(_step("attempt", record), now_ms)
        return record

    def landed(self, record: UsageRecord, state: RecordState, now_ms: int, **facts: str) -> None:
        """Stripe accepted it, or had it already."""
        if not self._is_open(record):
            self._store.add_step(_step("outcome", record, **facts | {"state": "settled"}), now_ms)
            return
        day = self._day(record)
        self._store.set_day(record.account, record.day, replace(day, landed=day.landed + record.value))
        self._store.drop_record(record.identifier)
        self._store.add_step(_step("outcome", replace(record, state=state), **facts), now_ms)

    def unanswered(
        self, record: UsageRecord, now_ms: int, *, new_key: bool, **facts: str
    ) -> UsageRecord | None:
        """Nothing is known; it is tried again under the same identifier.

        Returns:
            What to try again; None: it was settled meanwhile.
        """
        if not self._is_open(record):
            self._store.add_step(_step("outcome", record, **facts | {"state": "settled"}), now_ms)
            return None
        self._store.add_step(_step("outcome", record, **facts), now_ms)
        if new_key:
            record = replace(record, attempt_key=record.attempt_key + 1)
            self._store.set_record(record)
        return record

    def refused(self, record: UsageRecord, now_ms: int, **facts: str) -> None:
        """Stripe will not take it as it is: held until a person releases it, or its account is closed."""
        if not self._is_open(record):
            self._store.add_step(_step("outcome", record, **facts | {"state": "settled"}), now_ms)
            return
        record = replace(record, state=RecordState.REFUSED, held_reason="refused")
        self._store.set_record(record)
        self._store.add_step(_step("outcome", record, **facts), now_ms)

    def hold(self, record: UsageRecord, reason: str, now_ms: int) -> UsageRecord:
        """It must not be attempted any more; see `billing.reason_not_to_send`."""
        record = replace(record, held_reason=reason)
        self._store.set_record(record)
        self._store.add_step(_step("held", record, state="held"), now_ms)
        return record

    def release(self, record: UsageRecord, now_ms: int, *, why: str) -> UsageRecord:
        """A person lets a refused record be tried again; with a new key: Stripe may have stored its no."""
        record = replace(
            record, state=RecordState.UNKNOWN, held_reason="", attempt_key=record.attempt_key + 1
        )
        self._store.set_record(record)
        self._store.add_step(_step("released", record, detail=why), now_ms)
        return record

    def shadow(self, record: UsageRecord, now_ms: int) -> None:
        """A record that would be sent now, were sending not in shadow: it never will be."""
        account = self._store.account(record.account)
        self._store.set_account(record.account, replace(account, shadow=account.shadow + record.value))
        self._store.drop_record(record.identifier)
        self._store.add_step(_step("outcome", replace(record, state=RecordState.SHADOW)), now_ms)

    # -- money in flight

    def notice(self, key: AccountKey, day: int, about: About, now_ms: int, *, detail: str) -> None:
        """Stripe says that it rejected a record it had accepted. Only the summary decides what is missing."""
        if self._store.account(key).closed:
            reason = "closed"
        else:
            reason = ""
            self._store.set_day(key, day, replace(self._day_of(key, day), suspect=True))
        self._store.add_step(Step("notice", key, about, detail=detail, reason=reason), now_ms)

    def needs_look(self, key: AccountKey, day: int, now_ms: int) -> bool:
        """Whether a comparison of this day may come to something now."""
        what = self._store.days(key)[day]
        if not self.takes(key, now_ms) or self._store.account(key).undated or what.foreign:
            return False
        unknown = self._unknown(key, day)
        if what.confirmed and not what.suspect and not unknown:
            return False
        if now_ms - what.last_attempt_at < ABSENCE_MS:
            return False
        return all(now_ms - (record.first_attempt_at or 0) >= RESEND_MAX_MS for record in unknown)

    def compare(
        self, key: AccountKey, day: int, summary: int, now_ms: int
    ) -> tuple[Comparison, UsageRecord | None]:
        """A day against the summary Stripe gave after `needs_look`.

        Everything attempted is settled at once: the summary is what landed, and what is missing is one record
        under a new identifier. So whatever a late answer or notice says afterwards moves nothing.

        Returns:
            What it came to, and the record that was made anew.
        """
        if not self.needs_look(key, day, now_ms):
            return Comparison.TOO_EARLY, None
        what = self._store.days(key)[day]
        about = About.day(key, day)
        if summary > what.attempted:
            self._store.set_day(key, day, replace(what, foreign=True))
            self._store.add_step(
                Step(
                    "held",
                    key,
                    about,
                    state="held",
                    reason="foreign_usage",
                    detail=f"the summary shows {summary}",
                ),
                now_ms,
            )
            return Comparison.FOREIGN, None
        unknown = self._unknown(key, day)
        if not unknown and summary == what.landed:
            self._store.set_day(key, day, replace(what, confirmed=True, suspect=False))
            self._store.add_step(Step("confirmed", key, about, value=summary), now_ms)
            return Comparison.CONFIRMED, None
        prompted = bool(unknown) or what.suspect
        if not prompted and now_ms - what.last_attempt_at < UNPROMPTED_ABSENCE_MS:
            return Comparison.TOO_EARLY, None
        missing = what.landed + sum(record.value for record in unknown) - summary
        for record in unknown:
            self._settle(record, "reconciled", now_ms)
        self._store.set_day(key, day, replace(what, landed=summary, confirmed=True, suspect=False))
        self._store.add_step(
            Step("reconciled", key, about, value=summary, detail=f"missing {missing}"), now_ms
        )
        if not missing:
            return Comparison.SETTLED, None
        account = self._store.account(key)
        reissue = account.reissues + 1
        self._store.set_account(key, replace(account, reissues=reissue))
        record = self._record(key, about, missing, now_ms, reissue=reissue)
        self._write_down(record, now_ms)
        return Comparison.SETTLED, record

    def not_foreign(self, key: AccountKey, day: int, now_ms: int, why: str) -> None:
        """A person says that the summary is right again, or will be: compare the day once more."""
        what = self._store.days(key)[day]
        self._store.set_day(key, day, replace(what, foreign=False))
        step = Step(
            "released", key, About.day(key, day), state="released", reason="foreign_usage", detail=why
        )
        self._store.add_step(step, now_ms)

    # -- periods

    def may_close(self, key: AccountKey, now_ms: int) -> bool:
        """Whether no request of the account can still be on its way."""
        days = self._store.days(key).values()
        quiet = all(now_ms - day.last_attempt_at >= INVOICE_MARGIN_MS for day in days)
        return quiet and now_ms >= key.period_end and not self._store.account(key).closed

    def foreign_on_invoice(self, key: AccountKey, invoice_units: int) -> bool:
        """Whether the invoice charges more than this installation ever sent."""
        sent = sum(day.attempted for day in self._store.days(key).values())
        return invoice_units > sent + max(0, self._store.account(key).undated)

    def close(
        self, key: AccountKey, invoice_units: int, current: AccountKey, now_ms: int, why: str = ""
    ) -> tuple[Carry, UsageRecord | None]:
        """Close an account whose invoice is final; what is left goes into the current one. One commit.

        Nothing waits and nothing is withdrawn: records still open are settled here, and their value is a part
        of the carry.

        Args:
            current: of the same client and meter, and taking usage now.
        """
        unit_micro = self._terms.meters[key.meter].unit_micro
        account = self._store.account(key)
        landed = account.undated + sum(day.landed for day in self._store.days(key).values())
        carry = carry_of(account, landed, invoice_units, unit_micro)
        for record in list(self._store.open_records(key)):
            self._settle(record, "closed", now_ms)
        self._store.drop_days(key)
        self._store.set_account(key, Account(reissues=account.reissues, closed=True))
        about = About.account(key)
        self._store.add_step(
            Step("close", key, about, -carry.credits_micro, value=invoice_units, detail=why), now_ms
        )
        for part in ("remainder", "not_landed", "late", "clipped"):
            if amount := getattr(carry, part):
                self._store.add_step(Step("carry_part", key, about, amount, reason=part), now_ms)
        return carry, self.advance(current, carry.credits_micro, about, now_ms, reason="carry")

    # -- the rest

    def _settle(self, record: UsageRecord, reason: str, now_ms: int) -> None:
        self._store.drop_record(record.identifier)
        self._store.add_step(
            _step("settled", replace(record, held_reason=""), state="settled", reason=reason), now_ms
        )

    def _record(
        self, key: AccountKey, about: About, value: int, now_ms: int, *, reissue: int = 0
    ) -> UsageRecord:
        terms = self._terms
        return UsageRecord(
            identifier=usage_record_identifier(
                terms.installation_id,
                key.client_id,
                key.meter,
                about.window_id,
                about.cutoff_offset,
                reissue=reissue,
            ),
            client_id=key.client_id,
            meter=key.meter,
            map_version=terms.map_version,
            period_start=key.period_start,
            period_end=key.period_end,
            window_id=about.window_id,
            window_start=about.start,
            window_end=about.end,
            source_topic_id=about.source_topic_id,
            source_partition=about.source_partition,
            cutoff_offset=about.cutoff_offset,
            event_name=terms.meters[key.meter].event_name,
            customer=key.customer,
            value=value,
            event_timestamp=event_timestamp(about.start, about.end, key.period_start, key.period_end, now_ms),
            reissue=reissue,
        )

    def _write_down(self, record: UsageRecord, now_ms: int) -> None:
        self._store.set_record(record)
        self._store.add_step(_step("record", record), now_ms)

    def _is_open(self, record: UsageRecord) -> bool:
        """An answer may come after a comparison or a close has settled its record."""
        return self._store.open_record(record.identifier) is not None

    def _unknown(self, key: AccountKey, day: int) -> list[UsageRecord]:
        """Records of a day that Stripe may have. Refused ones wait for a person, or for the close."""
        return [
            record
            for record in self._store.open_records(key)
            if record.state is RecordState.UNKNOWN and record.day == day
        ]

    def _day(self, record: UsageRecord) -> Day:
        return self._day_of(record.account, record.day)

    def _day_of(self, key: AccountKey, day: int) -> Day:
        return self._store.days(key).get(day, Day())


def day_bounds(key: AccountKey, day: int) -> tuple[int, int]:
    """As much of a UTC day as lies in the account's period, in milliseconds."""
    start = day * DAY_S * 1000
    return max(start, key.period_start), min(start + DAY_S * 1000, key.period_end)


def _step(kind: str, record: UsageRecord, **facts: str) -> Step:
    return Step(
        kind,
        record.account,
        About.record(record),
        record=record,
        value=record.value,
        **{"state": record.state.value, "reason": record.held_reason} | facts,  # type: ignore[arg-type]  # names of its fields
    )
