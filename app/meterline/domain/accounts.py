"""The account of a client's meter in a billing period, and what Stripe is believed to hold of it.

    C  credits (micro): the sum of all changes of all snapshots; it may fall, and be negative
    U  units owed: max(0, floor(C / unit))

Each change of U is a usage record. A record is *open* until its outcome is known; then its value counts as
*landed* on the UTC day of its timestamp, because Stripe's summaries are compared day by day. So at every
moment, and after every commit:

    U = landed of all days + undated + shadow + values of all open records
"""

from __future__ import annotations

from dataclasses import dataclass

from meterline.domain.encoding import hash_hex

__all__ = ["DAY_S", "Account", "AccountKey", "Carry", "Day", "carry_of"]

DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class AccountKey:
    """Whose credits add up to units together, and on whose invoice. Period in milliseconds, half-open.

    The customer is part of it: a client that gets another customer in the middle of a period goes on under a
    second account, and each is closed against its own invoice.
    """

    client_id: str
    meter: str
    period_start: int
    period_end: int
    customer: str

    @property
    def name(self) -> str:
        """32 hexadecimal digits: the account's key in the state, and in names of records without a window."""
        return hash_hex(
            "meterline.account.2",
            self.client_id,
            self.meter,
            self.period_start,
            self.period_end,
            self.customer,
        )


@dataclass(frozen=True, slots=True)
class Account:
    """C and U of the module's first words, and what is told of U apart from days and open records.

    Attributes:
        undated: units landed before states kept days: they can't be compared by day, only by the invoice.
        shadow: units that were due while sending was in shadow: never told, never carried.
        reissues: records made to replace missing ones; numbers them.
        closed: its invoice is final and what was left was carried; nothing may be added any more.
        problem: why it may not be closed by itself, or will not reach its invoice; empty: none is known.
    """

    credits_micro: int = 0
    units: int = 0
    undated: int = 0
    shadow: int = 0
    reissues: int = 0
    closed: bool = False
    problem: str = ""

    def absorb(self, change_micro: int, unit_micro: int) -> tuple[int, int]:
        """C and U after a change; what the change is worth is the difference of the units."""
        credits_micro = self.credits_micro + change_micro
        return credits_micro, max(0, credits_micro // unit_micro)


@dataclass(frozen=True, slots=True)
class Day:
    """One UTC day of an account, as Stripe's summary should show it. Times in milliseconds, 0: never.

    Attributes:
        landed: units accepted by Stripe, or found in its summary when the day was settled.
        attempted: the most the summary can show if nobody else feeds the meter: all positive values for
            which a request was ever made, each identifier once.
        last_attempt_at: of any record of the day.
        suspect: Stripe gave notice that it rejected something.
        confirmed: the summary showed `landed`, and nothing was attempted since.
        foreign: the summary showed more than `attempted`.
    """

    landed: int = 0
    attempted: int = 0
    last_attempt_at: int = 0
    suspect: bool = False
    confirmed: bool = False
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Carry:
    """What a closed account hands on, in micro-credits, by where it comes from. The parts add up to it.

    Attributes:
        remainder: less than one unit; negative: the client was owed more than it used.
        not_landed: of records that never got a good answer: unsent, unknown, refused.
        late: accepted by Stripe, and not on the invoice; negative: on the invoice, and not known as landed.
        clipped: the invoice's line can't be negative, what landed was.
    """

    remainder: int
    not_landed: int
    late: int
    clipped: int

    @property
    def credits_micro(self) -> int:
        """The sum of the parts."""
        return self.remainder + self.not_landed + self.late + self.clipped


def carry_of(account: Account, landed: int, invoice_units: int, unit_micro: int) -> Carry:
    """The carry of an account that is closed: C - (what the invoice charges) * unit, in its parts.

    Args:
        account: at its close.
        landed: units of all its days, and undated ones.
        invoice_units: the quantity of the meter's line on the period's own invoice.
        unit_micro: micro-credits of a unit.
    """
    open_units = account.units - account.shadow - landed
    clipped = min(landed, 0) if invoice_units == 0 else 0
    return Carry(
        remainder=account.credits_micro - account.units * unit_micro,
        not_landed=open_units * unit_micro,
        late=(landed - invoice_units - clipped) * unit_micro,
        clipped=clipped * unit_micro,
    )
