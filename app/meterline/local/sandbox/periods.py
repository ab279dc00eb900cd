"""When billing periods end: whole intervals counted from the anchor, in UTC, as Stripe counts them.

Every boundary is computed from the anchor and never from the one before, so that a subscription of the 31st
comes back to the 31st after February.
"""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime, timedelta

__all__ = ["INTERVALS", "period_around"]

INTERVALS = ("day", "week", "month", "year")
_MONTHS = {"month": 1, "year": 12}
_DAYS = {"day": 1, "week": 7}


def period_around(anchor: int, interval: str, interval_count: int, moment: int) -> tuple[int, int]:
    """The period `[start, end)` that contains a moment; Unix seconds. The anchor may be after the moment."""
    start = datetime.fromtimestamp(anchor, UTC)
    now = datetime.fromtimestamp(moment, UTC)
    if interval in _DAYS:
        length = _DAYS[interval] * interval_count
        number = (now - start) // timedelta(days=length)
    else:
        length = _MONTHS[interval] * interval_count
        number = ((now.year - start.year) * 12 + now.month - start.month) // length
    # The guess for months looks at neither day nor time of day: it is right, or one too high.
    while _boundary(start, interval, length, number) > now:
        number -= 1
    while _boundary(start, interval, length, number + 1) <= now:
        number += 1
    edges = (_boundary(start, interval, length, edge) for edge in (number, number + 1))
    first, last = (int(edge.timestamp()) for edge in edges)
    return first, last


def _boundary(anchor: datetime, interval: str, length: int, number: int) -> datetime:
    """`number` periods of `length` days or months after the anchor; a day the month lacks is its last one."""
    if interval in _DAYS:
        return anchor + timedelta(days=length * number)
    months = anchor.year * 12 + anchor.month - 1 + length * number
    year, month = divmod(months, 12)
    day = min(anchor.day, monthrange(year, month + 1)[1])
    return anchor.replace(year=year, month=month + 1, day=day)
