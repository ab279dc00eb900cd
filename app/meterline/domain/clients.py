"""A client as the registry knows it, and its billing periods: pure functions of unit, anchor and time."""

from __future__ import annotations

from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from meterline.domain.events import ID_BYTES_MAX

__all__ = [
    "DEFAULT_ANCHORS_MS",
    "Client",
    "Period",
    "PeriodUnit",
    "QuotaPolicy",
    "check_client",
    "period_of",
]

_DAY_MS = 86_400_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class PeriodUnit(StrEnum):
    """How long a billing period is."""

    MONTH = "month"
    WEEK = "week"
    DAY = "day"


class QuotaPolicy(StrEnum):
    """What happens to work when credits cannot be asked for."""

    DENY = "deny"
    ALLOW = "allow"


DEFAULT_ANCHORS_MS = {PeriodUnit.MONTH: 0, PeriodUnit.WEEK: 4 * _DAY_MS, PeriodUnit.DAY: 0}
"""Calendar months, weeks from Monday (1970-01-05 was one), calendar days; all in UTC."""


@dataclass(frozen=True, slots=True)
class Client:
    """All that is known of one client. Times are milliseconds since the epoch, UTC.

    Attributes:
        stripe_customer_id: None: usage is counted and held until there is one.
        period_anchor: a moment at which a billing period starts.
        quota_policy: read by the quota app.
        alert_levels_percent: of the granted credits used; ascending, 1 to 100.
        test: nothing is sent to Stripe in live mode.
        sending_paused: usage records are made and kept, none is sent.
        updated_by: a person or a program.
    """

    client_id: str
    stripe_customer_id: str | None = None
    period_unit: PeriodUnit = PeriodUnit.MONTH
    period_anchor: int = 0
    quota_policy: QuotaPolicy = QuotaPolicy.DENY
    alert_levels_percent: tuple[int, ...] = ()
    test: bool = False
    sending_paused: bool = False
    updated_at: int = 0
    updated_by: str = ""


@dataclass(frozen=True, slots=True)
class Period:
    """One billing period, half-open `[start, end)`, milliseconds since the epoch, UTC."""

    start: int
    end: int


def check_client(client: Client) -> None:
    """The rules a registry record must meet.

    Raises:
        ValueError: says which field is wrong.
    """
    if not 1 <= len(client.client_id.encode()) <= ID_BYTES_MAX:
        raise ValueError(f"client_id must have 1 to {ID_BYTES_MAX} bytes")
    customer = client.stripe_customer_id
    if customer is not None and not (customer.startswith("cus_") and len(customer) > len("cus_")):
        raise ValueError(f"stripe_customer_id {customer!r} is not a Stripe customer id (cus_...)")
    levels = client.alert_levels_percent
    if list(levels) != sorted(set(levels)) or not all(1 <= level <= 100 for level in levels):
        raise ValueError(f"alert_levels_percent {list(levels)} must ascend from 1 to 100")


def period_of(client: Client, t_ms: int) -> Period:
    """The billing period that holds a moment.

    Periods repeat from the anchor in both directions. A month starts at the anchor's day of month and time of
    day; where the month is too short, on its last day (Stripe's rule for billing cycle anchors).

    Raises:
        ValueError: the moment is outside the years a calendar has (1 to 9999).
    """
    anchor = client.period_anchor
    if client.period_unit is not PeriodUnit.MONTH:
        length = _DAY_MS if client.period_unit is PeriodUnit.DAY else 7 * _DAY_MS
        start = t_ms - (t_ms - anchor) % length
        return Period(start, start + length)
    try:
        first, moment = _EPOCH + anchor * _MILLISECOND, _EPOCH + t_ms * _MILLISECOND
        months = (moment.year - first.year) * 12 + moment.month - first.month
        if _months_after(first, months) > t_ms:
            months -= 1
        return Period(_months_after(first, months), _months_after(first, months + 1))
    except (OverflowError, ValueError):
        raise ValueError(f"no calendar month holds {t_ms} ms with the anchor {anchor} ms") from None


def _months_after(anchor: datetime, months: int) -> int:
    """Milliseconds of the boundary so many months after the anchor, counted from the anchor itself.

    Counting from the anchor and not from the boundary before keeps a 31st a 31st after a February.
    """
    year, month = divmod(anchor.year * 12 + anchor.month - 1 + months, 12)
    day = min(anchor.day, monthrange(year, month + 1)[1])
    return (anchor.replace(year=year, month=month + 1, day=day) - _EPOCH) // _MILLISECOND
