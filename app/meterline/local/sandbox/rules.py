"""What Stripe leaves to the account, to chance or to no document: one setting each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from meterline.local.sandbox.errors import StripeError

__all__ = ["ASYNC_CODES", "HOUR_S", "INVOICE_GRACE_MAX_S", "Rules"]

HOUR_S = 3_600
INVOICE_GRACE_MAX_S = 72 * HOUR_S
"""The longest finalization grace period the Dashboard takes."""


ASYNC_CODES = (
    "archived_meter",
    "meter_event_customer_not_found",
    "meter_event_invalid_value",
    "meter_event_no_customer_defined",
    "meter_event_value_not_found",
    "meter_event_value_too_many_digits",
    "no_meter",
    "timestamp_in_future",
    "timestamp_too_far_in_past",
)
"""Codes of Stripe's error reports; those of dimensions, a preview, are left out."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings, as a new account has them. `POST /_sandbox/rules` changes them; the journal keeps them.

    Attributes:
        invoice_grace_s: how long an invoice of a subscription's cycle stays a draft: the account's
            finalization grace period, at most 72 hours.
        summary_lag_s: how much later than its receipt an event shows in summaries. Stripe says "eventually
            consistent" and names no time.
        async_codes: codes of Stripe's error reports; a v1 meter event that has such a fault is answered with
            200 and rejected afterwards, any other fault is a 400 at once. Which are which changes between
            Stripe's pages; only the unknown customer is never listed as found at once.
        report_delay_s: how much later than its ten seconds a report of rejections comes.
        report_samples_max: requests that a report names of each code.
        concurrency_status: the answer to a second call for a customer and meter while one runs: 429 with
            `lock_timeout`, or 409; both were seen.
        rate_limit_per_s: requests a second for the whole account; 0: no limit. A test account has 25.
        meter_event_rate_limit_per_s: the same for meter events. A live account has 1,000.
        rate_limit_reason: whether a 429 of these says so in `Stripe-Rate-Limited-Reason`.
    """

    invoice_grace_s: int = HOUR_S
    summary_lag_s: int = 0
    async_codes: tuple[str, ...] = ("meter_event_customer_not_found",)
    report_delay_s: int = 0
    report_samples_max: int = 5
    concurrency_status: int = 429
    rate_limit_per_s: int = 0
    meter_event_rate_limit_per_s: int = 0
    rate_limit_reason: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.invoice_grace_s <= INVOICE_GRACE_MAX_S:
            raise StripeError(400, "invoice_grace_s is from 0 to 259200 (72 hours).", param="invoice_grace_s")
        for name in self.names():
            value = getattr(self, name)
            if isinstance(value, int) and value < 0:
                raise StripeError(400, f"{name} is 0 or more.", param=name)
        if unknown := [code for code in self.async_codes if code not in ASYNC_CODES]:
            raise StripeError(400, f"Not codes of error reports: {unknown}", param="async_codes")
        if self.concurrency_status not in {409, 429}:
            raise StripeError(400, "concurrency_status is 409 or 429.", param="concurrency_status")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The rules a journal holds; those of a later version are ignored, absent ones are the defaults."""
        return cls().changed({key: value for key, value in values.items() if key in cls.names()})

    def to_json(self) -> dict[str, Any]:
        """All of them, for the journal and for who asks."""
        return asdict(self)

    def changed(self, values: dict[str, Any]) -> Self:
        """These rules with some of them changed.

        Raises:
            StripeError: 400 for a name, type or number that is none.
        """
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        for name, value in values.items():
            if name not in self.names():
                raise StripeError(400, f"Received unknown parameter: {name}", param=name)
            if type(value) is not type(getattr(self, name)):
                raise StripeError(400, f"{name} must be like {getattr(self, name)!r}.", param=name)
        return replace(self, **values)

    @classmethod
    def names(cls) -> list[str]:
        """Their names."""
        return [field.name for field in fields(cls)]
