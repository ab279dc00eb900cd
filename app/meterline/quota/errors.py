"""What the quota library raises, by what the caller should do about it.

MeterlineError
├── CreditsExhausted          don't start this work: the client has too few credits
├── ReservationLapsed         this reservation has ended; new work needs a new attempt's id
├── RetryLater
│   └── QuotaUnavailable      nobody decided in time; the same call again is safe
└── UserError
    ├── ReservationConflict   one id, two amounts or two clients: a mistake in the program
    └── InvalidReservation    an id, an amount, a time or a part that can never be accepted
"""

from __future__ import annotations

from decimal import Decimal

from meterline.errors import MeterlineError, RetryLater, UserError

__all__ = [
    "CreditsExhausted",
    "InvalidReservation",
    "QuotaUnavailable",
    "ReservationConflict",
    "ReservationLapsed",
]


class CreditsExhausted(MeterlineError):  # noqa: N818 - named for what happened
    """The client's credits don't cover this work. Nothing was reserved, and nothing remembers the attempt.

    Attributes:
        client_id: whose credits.
        requested: credits asked for.
        available: credits that were left; negative is debt.
    """

    def __init__(self, client_id: str, requested: Decimal, available: Decimal) -> None:
        super().__init__(client_id, requested, available)
        self.client_id = client_id
        self.requested = requested
        self.available = available

    def __str__(self) -> str:
        return f"{self.client_id} has {self.available:f} credits left; {self.requested:f} were requested"

    @property
    def shortfall(self) -> Decimal:
        """Credits that are missing."""
        return self.requested - self.available


class ReservationLapsed(MeterlineError):  # noqa: N818 - named for what happened
    """A reservation that was voided or expired is ended for good.

    Reserve under a new id (task and *next* attempt). Work already done under this one is charged by the log.
    """

    def __init__(self, client_id: str, reservation_id: str) -> None:
        super().__init__(client_id, reservation_id)
        self.client_id = client_id
        self.reservation_id = reservation_id

    def __str__(self) -> str:
        return f"reservation {self.reservation_id!r} of {self.client_id} was voided or expired; use a new id"


class QuotaUnavailable(RetryLater):
    """Nobody decided: Redis is away or slow, or the buckets are closed while they are rebuilt.

    The same call again, with the same ids, is safe: every call can be repeated.
    """


class ReservationConflict(UserError, ValueError):  # noqa: N818 - named for what was given
    """The id is taken by a reservation of another amount or another client. Nothing was changed."""


class InvalidReservation(UserError, ValueError):  # noqa: N818 - named for what was given
    """This can never be accepted; the text says what to change. Nothing was sent."""
