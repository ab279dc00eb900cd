"""What Stripe leaves to the account, to chance or to no document: one setting each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from meterline.local.sandbox.errors import StripeError

__all__ = ["Rules"]

HOUR_S = 3_600
INVOICE_GRACE_MAX_S = 72 * HOUR_S
"""The longest finalization grace period the Dashboard takes."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings, as a new account has them. `POST /_sandbox/rules` changes them; the journal keeps them.

    Attributes:
        invoice_grace_s: how long an invoice of a subscription's cycle stays a draft: the account's
            finalization grace period, at most 72 hours.
        summary_lag_s: how much later than its receipt an event shows in summaries. Stripe says "eventually
            consistent" and names no time.
    """

    invoice_grace_s: int = HOUR_S
    summary_lag_s: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.invoice_grace_s <= INVOICE_GRACE_MAX_S:
            raise StripeError(400, "invoice_grace_s is from 0 to 259200 (72 hours).", param="invoice_grace_s")
        if self.summary_lag_s < 0:
            raise StripeError(400, "summary_lag_s is 0 or more.", param="summary_lag_s")

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
        for name, value in values.items():
            if name not in self.names():
                raise StripeError(400, f"Received unknown parameter: {name}", param=name)
            if type(value) is not type(getattr(self, name)):
                kind = type(getattr(self, name)).__name__
                raise StripeError(400, f"{name} must be of JSON type {kind}.", param=name)
        return replace(self, **values)

    @classmethod
    def names(cls) -> list[str]:
        """Their names."""
        return [field.name for field in fields(cls)]
