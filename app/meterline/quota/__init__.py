"""Credit buckets: no work starts without credits."""

from __future__ import annotations

from meterline.quota.answers import Balance, Part, Reservation
from meterline.quota.buckets import CreditBuckets
from meterline.quota.errors import (
    CreditsExhausted,
    InvalidReservation,
    QuotaUnavailable,
    ReservationConflict,
    ReservationLapsed,
)
from meterline.quota.fake import FakeCreditBuckets
from meterline.quota.leases import LeasePlan
from meterline.quota.sync import SyncCreditBuckets

__all__ = [
    "Balance",
    "CreditBuckets",
    "CreditsExhausted",
    "FakeCreditBuckets",
    "InvalidReservation",
    "LeasePlan",
    "Part",
    "QuotaUnavailable",
    "Reservation",
    "ReservationConflict",
    "ReservationLapsed",
    "SyncCreditBuckets",
]
