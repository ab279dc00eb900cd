"""Billing periods tile time: half-open, without gap or overlap, and every moment is in its own."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.clients import Client, Period, PeriodUnit, period_of

DAY_MS = 86_400_000
MOMENTS_MS = st.integers(0, 4_102_444_800_000)  # 1970 to 2100
CLIENTS = st.builds(
    Client, client_id=st.just("acme"), period_unit=st.sampled_from(PeriodUnit), period_anchor=MOMENTS_MS
)


def _utc(t_ms: int) -> datetime:
    return datetime.fromtimestamp(t_ms / 1000, UTC)


@given(CLIENTS, MOMENTS_MS)
def test_a_period_holds_its_moment(client: Client, t_ms: int) -> None:
    period = period_of(client, t_ms)

    assert period.start <= t_ms < period.end


@given(CLIENTS, MOMENTS_MS)
def test_periods_are_contiguous(client: Client, t_ms: int) -> None:
    """The next period begins where this one ends, the one before ends where this one begins."""
    period = period_of(client, t_ms)

    assert period == period_of(client, period.start)
    assert period == period_of(client, period.end - 1)
    assert period.end == period_of(client, period.end).start
    assert period.start == period_of(client, period.start - 1).end


@given(CLIENTS)
def test_the_anchor_starts_a_period(client: Client) -> None:
    assert period_of(client, client.period_anchor).start == client.period_anchor


@given(CLIENTS, MOMENTS_MS)
def test_a_period_has_the_length_of_its_unit(client: Client, t_ms: int) -> None:
    period = period_of(client, t_ms)
    days = {
        PeriodUnit.DAY: {DAY_MS},
        PeriodUnit.WEEK: {7 * DAY_MS},
        PeriodUnit.MONTH: {days * DAY_MS for days in range(28, 32)},
    }[client.period_unit]

    assert period.end - period.start in days


@given(MOMENTS_MS, MOMENTS_MS)
def test_a_month_starts_on_the_anchors_day_or_the_last_of_a_short_month(anchor: int, t_ms: int) -> None:
    client = Client("acme", period_anchor=anchor)
    start = _utc(period_of(client, t_ms).start)

    assert start.day == _utc(anchor).day or (
        start.day < _utc(anchor).day and _utc(period_of(client, t_ms).start + DAY_MS).day == 1
    )
    assert start.time() == _utc(anchor).time()


def test_a_31st_is_clipped_in_february_and_comes_back_in_march() -> None:
    client = Client("acme", period_anchor=_ms(2026, 1, 31))

    assert period_of(client, _ms(2026, 2, 10)) == Period(_ms(2026, 1, 31), _ms(2026, 2, 28))
    assert period_of(client, _ms(2026, 3, 1)) == Period(_ms(2026, 2, 28), _ms(2026, 3, 31))
    assert period_of(client, _ms(2028, 2, 29)) == Period(_ms(2028, 2, 29), _ms(2028, 3, 31))


def _ms(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=UTC).timestamp() * 1000)
