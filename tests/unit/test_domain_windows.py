"""Windows are half-open, aligned to the epoch, and named by what they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot, window_start_of

HOUR = 3_600_000
REF = WindowRef("acme", 0, HOUR, "topic", 3)


def snapshot(**skus: SkuTotal) -> WindowSnapshot:
    return WindowSnapshot(REF, 17, skus, closed_at=1, watermark=2)


@pytest.mark.parametrize(
    ("occurred_at", "start"),
    [(0, 0), (HOUR - 1, 0), (HOUR, HOUR), (HOUR + 1, HOUR), (490_000 * HOUR + 7, 490_000 * HOUR)],
)
def test_the_end_of_a_window_belongs_to_the_next(occurred_at, start):
    """`[start, end)`: every moment is in exactly one window."""
    assert start == window_start_of(occurred_at, HOUR)


@pytest.mark.parametrize(
    "change",
    [{"client_id": "acm"}, {"start": 1}, {"end": HOUR + 1}, {"topic_id": "topi"}, {"partition": 4}],
)
def test_every_part_of_a_window_is_part_of_its_id(change):
    """Two windows never share an id."""
    assert REF.window_id != replace(REF, **change).window_id


def test_only_billable_credits_are_owed():
    """Free usage is on the receipt, not on the invoice; corrections may make an amount negative."""
    amounts = snapshot(a=SkuTotal(2, 30, 1, 1_000), b=SkuTotal(1, -10, 0, 0))

    assert amounts.billable_credits_micro == 20


def test_times_are_no_part_of_the_statement():
    """Two snapshots of one cutoff that differ in closing time only say the same."""
    first = snapshot(a=SkuTotal(1, 5))

    assert first.same_amounts(replace(first, closed_at=99, watermark=98))
    assert not first.same_amounts(snapshot(a=SkuTotal(1, 6)))
    assert not first.same_amounts(snapshot(a=SkuTotal(1, 5), b=SkuTotal()))
