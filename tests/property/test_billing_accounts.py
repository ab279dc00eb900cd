"""The arithmetic of billing: whatever arrives in whatever order, Stripe is told the floor of the truth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.accounts import Account, carry_of
from meterline.domain.billing import (
    FUTURE_MAX_MS,
    HOUR_MS,
    PAST_MAX_MS,
    Known,
    Verdict,
    changes_of,
    event_timestamp,
    invoice_takes,
    judge,
)

credits_micro = st.integers(-(10**15), 10**15)
units = st.integers(10_000, 10**9)


@given(st.lists(credits_micro), units)
def test_the_sum_of_all_values_is_the_floor_of_all_credits(changes, unit):
    """Rule B1: falling totals and negative sums included, no rounding is ever lost or gained."""
    account, told = Account(), 0
    for change in changes:
        after = Account(*account.absorb(change, unit))
        told += after.units - account.units
        account = after

    assert told == account.units == max(0, sum(changes) // unit)
    assert account.credits_micro == sum(changes)


@given(st.lists(credits_micro), units)
def test_credits_are_units_and_a_remainder(changes, unit):
    """C = U * unit + remainder; the remainder is below one unit unless the client is owed credits."""
    account = Account()
    for change in changes:
        account = Account(*account.absorb(change, unit))
        remainder = account.credits_micro - account.units * unit

        assert remainder < unit
        assert remainder >= 0 or account.units == 0


snapshots_of_windows = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 30), st.dictionaries(st.sampled_from("ab"), credits_micro)),
    max_size=40,
)


@given(snapshots_of_windows, st.randoms(use_true_random=False), units)
def test_the_newest_snapshot_of_each_window_counts_whatever_the_order(snapshots, random, unit):
    """Repeats and late arrivals change nothing: an account holds the newest snapshot of each window, once."""
    truth = {(window, cutoff): meters for window, cutoff, meters in reversed(snapshots)}
    deliveries = [*truth.items(), *truth.items()]
    random.shuffle(deliveries)
    known: dict[int, Known] = {}
    accounts: dict[str, Account] = {}
    told = dict.fromkeys("ab", 0)
    for (window, cutoff), meters in deliveries:
        if judge(known.get(window), cutoff, repr(meters)) is not Verdict.NEWER:
            continue
        for meter, change in changes_of(known.get(window), meters).items():
            before = accounts.get(meter, Account())
            accounts[meter] = Account(*before.absorb(change, unit))
            told[meter] += accounts[meter].units - before.units
        known[window] = Known(cutoff, repr(meters), meters)

    newest = {window: max(c for w, c in truth if w == window) for window, _ in truth}
    for meter in "ab":
        owed = sum(truth[window, cutoff].get(meter, 0) for window, cutoff in newest.items())
        assert told[meter] == max(0, owed // unit)
        assert accounts.get(meter, Account()).credits_micro == owed


whole = st.integers(-(10**9), 10**9)


@given(st.tuples(whole, whole, whole), st.integers(0, 10**9), credits_micro, units)
def test_the_parts_of_a_carry_are_all_that_the_invoice_leaves(told, invoiced, rest, unit):
    """C - (invoiced + shadow) * unit, whatever was told, lost, rejected or came too late."""
    owed, landed, shadow = told
    account = Account(credits_micro=owed * unit + rest, units=owed, shadow=shadow)

    carry = carry_of(account, landed, invoiced, unit)

    assert carry.credits_micro == account.credits_micro - (invoiced + shadow) * unit
    assert carry.clipped <= 0
    assert invoiced == 0 or carry.clipped == 0


@given(
    start=st.integers(0, 2**41).map(lambda ms: ms // 1000 * 1000),
    length_s=st.integers(1, 31 * 86_400),
    age_ms=st.integers(-HOUR_MS, 100 * 24 * HOUR_MS),
    period=st.sampled_from([86_400_000, 30 * 86_400_000, 365 * 86_400_000]),
)
def test_a_timestamp_is_one_that_stripe_and_the_invoice_take(start, length_s, age_ms, period):
    """In its period; not ahead of Stripe's limit; in its window while Stripe takes its date."""
    end = start + length_s * 1000
    now = end + age_ms
    own_start = start - start % period
    own_end = own_start + period
    if not invoice_takes(own_end, now):
        own_start, own_end = now - now % period, now - now % period + period

    stamp_ms = event_timestamp(start, end, own_start, own_end, now) * 1000

    assert own_start <= stamp_ms < own_end
    if now >= own_start:
        assert stamp_ms <= now + FUTURE_MAX_MS + 1000
    middle = start + length_s * 500
    if own_start <= middle < own_end and now - PAST_MAX_MS <= middle <= now:
        assert start <= stamp_ms < end
        if length_s > 2:
            assert stamp_ms % 60_000
