"""What guards each unit on its way to Stripe: a worker dies anywhere, and what was used is paid once.

The real owner of a partition of usage.windows in a world of dictionaries (tests/billing_world.py).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from tests.billing_world import HOUR, MICRO, MINUTE, NOW, Crash, Stripe, World

from meterline.domain.clients import PeriodUnit
from meterline.ledger.billing_orders import BillingOrder


def lives():
    """A world for each place at which the first worker may die; the second one works to the end."""
    undisturbed = World()
    undisturbed.say_some()
    undisturbed.work()
    for dies_at in range(1, undisturbed.places + 1):
        world = World()
        world.say_some()
        world.dies_at = dies_at
        world.work()
        # All the rest in one batch: of a window's snapshots only the newest is valued now.
        world.work(slice_length=100)
        yield dies_at, world


def test_a_crash_anywhere_bills_the_whole_credits_once():
    """Before or after a commit, an insert, a request: Stripe's units are the floor of what was used."""
    wrong = {
        dies_at: (world.halted, world.stripe.units())
        for dies_at, world in lives()
        if world.stripe.units() != world.owed_units()
    }

    assert wrong == {}


def test_a_crash_anywhere_leaves_every_credit_in_the_ledger():
    """Also those that made no whole unit: the steps add up to the credits, not to the units."""
    wrong = {
        dies_at: world.advanced_micro()
        for dies_at, world in lives()
        if world.advanced_micro() != world.owed_micro()
    }

    assert wrong == {}


def test_no_unit_is_sent_for_a_window_unlike_the_ledger():
    """It waits, whatever it claims."""
    world = World()
    world.say("liar", 4, 7, 50_000_000, true=False)

    world.work()

    assert world.stripe.units() == {}


def test_two_installations_on_one_account_both_arrive():
    """Same client ids, same windows, same offsets: Stripe must not take one's units for the other's."""
    stripe = Stripe()
    ours, theirs = World(stripe, "ours"), World(stripe, "theirs")
    for world in (ours, theirs):
        world.say_some()
        world.work()

    assert stripe.units() == {client: 2 * units for client, units in ours.owed_units().items()}


def test_two_installations_that_share_a_customer_are_told_and_move_no_unit():
    """Stripe's sum is right. What neither sent is nobody's to take back: both say so, day by day."""
    stripe = Stripe()
    ours, theirs = World(stripe, "ours"), World(stripe, "theirs")
    for world in (ours, theirs):
        world.say("acme", 2, 3, 7_000_000)
        world.work(until=NOW + MINUTE)

    for world in (ours, theirs):
        world.work(until=NOW + 40 * HOUR, every=HOUR)

    assert stripe.units() == {"acme": 14}
    assert [step["reason"] for world in (ours, theirs) for step in world.of_kind("held")] == [
        "foreign_usage",
        "foreign_usage",
    ]


def test_another_stripe_account_is_sent_no_unit():
    """A key of another account, or one that was wiped: its meter is another one. Back again, it goes on."""
    world = World()
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + MINUTE)
    world.say("acme", 1, 4, 2_000_000)
    ours, world.stripe, world.meter_ids = world.stripe, Stripe(), {"credits": "mtr_2"}

    world.work(until=world.clock.now + 40 * HOUR, every=HOUR)

    assert world.stripe.units() == {}
    assert "billed as mtr_1 at Stripe, the account of this key has mtr_2" in world.halted
    world.stripe, world.meter_ids = ours, {"credits": "mtr_1"}
    world.work()
    assert world.stripe.units() == {"acme": 9}


def test_a_lost_changelog_bills_nothing_again():
    """Stripe has forgotten the names by now, the ledger remembers the steps: a fresh start halts."""
    world = World()
    world.say_some()
    world.work()
    before = world.stripe.units()
    world.changelog.clear()
    world.stripe.known.clear()

    world.work(slice_length=100)

    assert world.stripe.units() == before
    assert "lost state" in world.halted


# -- money in flight


def test_a_lost_answer_is_no_second_unit_when_stripe_has_forgotten_the_name():
    """After 23 hours the identifier is never sent again: the day's summary decides, and has the units."""
    world = World()
    world.stripe.lose = ["after"]
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + 10 * MINUTE)
    # The worker is away until Stripe has forgotten the identifier.
    world.clock.now = NOW + 25 * HOUR

    world.work(until=NOW + 40 * HOUR, every=HOUR)

    assert world.stripe.units() == {"acme": 7}
    assert [(step["value"], step["detail"]) for step in world.of_kind("reconciled")] == [(7, "missing 0")]


def test_a_request_that_never_arrived_is_made_anew_under_another_name():
    """Unknown for 23 hours, absent from the summary: the units that are missing go once more, and once."""
    world = World()
    world.stripe.lose = ["before"] * 1_000
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + 24 * HOUR, every=HOUR)
    world.stripe.lose = []

    world.work(until=NOW + 40 * HOUR, every=HOUR)

    assert world.stripe.units() == {"acme": 7}
    assert [(step["value"], step["detail"]) for step in world.of_kind("reconciled")] == [(0, "missing 7")]


def test_a_young_attempt_is_not_taken_for_missing():
    """The summary is an hour late: what it doesn't show yet must not be told a second time."""
    world = World()
    world.stripe.lag = 5 * HOUR
    world.stripe.lose = ["reject"]
    world.say("acme", 3, 3, 2_000_000)
    world.work(until=NOW + 20 * MINUTE)
    world.say("acme", 2, 4, 5_000_000)

    world.work(until=NOW + 30 * HOUR, every=30 * MINUTE)

    units_counted = [record.value for record, _ in world.stripe.counted]
    assert units_counted == [5, 2]


def test_each_time_anew_is_a_name_of_its_own():
    """Rejected twice: Stripe remembers the first two names, and would take a third request for a copy."""
    world = World()
    world.stripe.lose = ["reject", "reject"]
    world.say("acme", 2, 3, 7_000_000)

    world.work(until=NOW + 30 * HOUR, every=30 * MINUTE)

    assert world.stripe.units() == {"acme": 7}
    assert len(world.stripe.notices) == 2


def test_a_notice_of_a_rejection_brings_the_units_onto_their_own_invoice():
    """Stripe had answered 200. Within the day the period ends; its invoice has them all the same."""
    world = World(unit=PeriodUnit.DAY)
    world.stripe.lose = ["reject"]
    world.say("acme", 2, 3, 7_000_000)

    world.work(until=NOW + 20 * HOUR, every=10 * MINUTE)

    assert world.invoiced_units("acme") == 7
    assert world.balance_micro("acme") == 0


def test_a_rejection_that_is_told_twice_moves_no_unit():
    """The summary decides, not the notice: what was made anew is not made anew again."""
    world = World()
    world.stripe.lose = ["reject"]
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + 10 * HOUR, every=30 * MINUTE)
    (notice,) = world.stripe.notices
    world.stripe.notices.append(type(notice)((NOW + 11 * HOUR) // 1000, *list(_fields(notice))[1:]))
    world.clock.now = NOW + 11 * HOUR

    world.work(until=NOW + 30 * HOUR, every=30 * MINUTE)

    assert world.stripe.units() == {"acme": 7}


def _fields(notice):
    return (getattr(notice, name) for name in type(notice).__slots__)


def test_a_rejection_after_the_day_was_confirmed_is_made_good():
    """Summaries showed the units, then Stripe took them back: its notice opens the day once more."""
    world = World()
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + 10 * HOUR, every=30 * MINUTE)
    assert [step["value"] for step in world.of_kind("confirmed")] == [7]
    ((record, _),) = world.stripe.counted
    world.stripe.take_back(record, world.clock.now)

    world.work(until=NOW + 30 * HOUR, every=30 * MINUTE)

    assert world.stripe.units() == {"acme": 7}


def test_a_silent_rejection_is_found_a_day_later():
    """No sample of any notice names it; the comparison of the day does."""
    world = World()
    world.stripe.lose = ["reject"]
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + MINUTE)
    world.stripe.notices.clear()

    world.work(until=NOW + 40 * HOUR, every=HOUR)

    assert world.stripe.units() == {"acme": 7}


def test_usage_of_somebody_else_on_the_meter_moves_no_unit():
    """The summary shows more than was ever sent: held in plain sight, nothing is taken back."""
    world = World()
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + MINUTE)
    world.stripe.counted.append(world.stripe.counted[0])

    world.work(until=NOW + 40 * HOUR, every=HOUR)

    assert world.stripe.units() == {"acme": 14}
    assert [(step["state"], step["reason"]) for step in world.of_kind("held")] == [("held", "foreign_usage")]


# -- periods


def closing():
    """A day's period that ends with a remainder, with units that never arrived, and with late usage."""
    world = World(unit=PeriodUnit.DAY)
    world.say("acme", 7, 3, 7_600_000)
    world.say("acme", 6, 4, 1_700_000)
    world.stripe.lose = ["", "before"] + ["before"] * 400
    return world


def finish_closing(world):
    """The rest arrives on the next day; late usage of the first day comes after its invoice is closed."""
    world.work(slice_length=1, until=NOW + 16 * HOUR, every=40 * MINUTE)
    world.stripe.lose = []
    world.clock.now = max(world.clock.now, NOW + 17 * HOUR + 10 * MINUTE)
    if len(world.log) == 2:
        world.say("acme", 5, 9, 2_500_000)
    world.work(slice_length=1, until=NOW + 42 * HOUR, every=40 * MINUTE)


def test_a_closed_period_carries_what_its_invoice_left():
    """7 of 9 units arrived, 0.3 credits were no unit: both go on to the next day's invoice."""
    world = closing()

    finish_closing(world)

    assert world.invoiced_units("acme") == 7
    assert world.carried_micro("acme")["not_landed"] == 2 * MICRO
    assert world.balance_micro("acme") == 0
    assert world.stripe.units() == {"acme": 11}


def test_a_crash_anywhere_around_a_close_loses_no_credit():
    """The close and its carry are one commit: each credit is invoiced, or stands in an account."""
    undisturbed = closing()
    finish_closing(undisturbed)
    wrong = {}
    # Every seventh place: each kind of them, in each phase.
    for dies_at in range(1, undisturbed.places, 7):
        world = closing()
        world.dies_at = dies_at
        finish_closing(world)
        finish_closing(world)
        if (world.balance_micro("acme"), world.stripe.units()) != (0, {"acme": 11}):
            wrong[dies_at] = ("acme", world.balance_micro("acme"), world.stripe.units(), world.halted)

    assert wrong == {}


def test_what_is_accepted_is_on_its_invoice():
    """Minutes before an invoice is final nothing is sent for it: a slow request would be too late.

    The usage goes onto the next invoice at once, not only after the first one is closed.
    """
    world = World(unit=PeriodUnit.DAY)
    world.clock.now = NOW + 17 * HOUR - 5 * MINUTE
    world.stripe.takes_ms = 6 * MINUTE
    world.say("acme", 1, 3, 7_000_000)

    world.work(until=NOW + 20 * HOUR)

    assert world.carried_micro("acme").get("late", 0) == 0
    assert world.stripe.units() == {"acme": 7}
    assert [step["value"] for step in world.of_kind("close")] in ([], [0])


def test_a_customers_units_arrive_one_request_at_a_time():
    """Stripe takes one call per customer and meter: another one is refused, and its units wait."""
    world = World()
    for hour in range(3, 9):
        world.say("acme", hour, 20 - hour, 1_000_000)

    world.work(slice_length=6)

    assert (world.stripe.units(), world.refused) == ({"acme": 6}, 0)


def test_a_stalled_owner_bills_nothing():
    """It wakes up after another worker has billed its window: the broker refuses its commit, and it ends.

    It knows an older snapshot only, whose usage record would have a name of its own: Stripe would count both.
    """
    world = World()
    world.say("acme", 5, 3, 7_600_000)
    world.say("acme", 5, 9, 9_400_000)

    async def two_workers():
        stalled, _ = await world.take_over()
        fresh, _ = await world.take_over()
        for records in (world.log, (), ()):
            await world.flush(fresh, records)
        with suppress(Crash):
            for records in (world.log[:1], (), ()):
                await world.flush(stalled, records)

    asyncio.run(two_workers())

    assert world.stripe.units() == world.owed_units() == {"acme": 9}


# -- orders


def ordered(action, target, value=0):
    return BillingOrder(f"order-{action}", NOW, action, "acme", target, value, "ann", "because")


def test_a_refused_record_is_sent_when_a_person_releases_it_and_once():
    """Stripe's reason is gone; the order stays in the ledger, and is carried out a single time."""
    world = World()
    world.stripe.lose = ["refuse"]
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + HOUR)
    assert world.stripe.units() == {}
    (refused,) = (step for step in world.of_kind("outcome") if step["state"] == "refused")
    world.orders = [ordered("release", refused["identifier"])]

    for _ in range(2):
        world.work(until=world.clock.now + 2 * HOUR)

    assert world.stripe.units() == {"acme": 7}
    assert len(world.of_kind("order")) == 1


def test_a_period_without_a_readable_invoice_is_closed_with_what_a_person_says():
    """7 of 9 units were charged: the other two are carried into the current period, once."""
    world = World(unit=PeriodUnit.DAY)
    world.stripe.void = True
    world.say("acme", 7, 3, 9_300_000)
    world.work(until=NOW + 20 * HOUR, every=HOUR)
    (account,) = world.of_kind("held")
    world.orders = [ordered("resolve", account["window_id"], value=7)]

    world.work(until=NOW + 24 * HOUR, every=HOUR)

    assert account["reason"] == "invoice_void"
    assert world.carried_micro("acme") == {"remainder": 300_000, "late": 2 * MICRO}
    assert world.stripe.units() == {"acme": 11}
    assert world.balance_micro("acme") == 0


def test_a_foreign_day_is_compared_again_after_a_release():
    """Somebody took the foreign usage back: the summary is right, and no unit has moved."""
    world = World()
    world.say("acme", 2, 3, 7_000_000)
    world.work(until=NOW + MINUTE)
    foreign = world.stripe.counted[0]
    world.stripe.counted.append(foreign)
    world.work(until=NOW + 20 * HOUR, every=HOUR)
    (held,) = world.of_kind("held")
    world.stripe.counted.remove(foreign)
    world.orders = [ordered("release", held["window_id"])]

    world.work(until=NOW + 30 * HOUR, every=HOUR)

    assert world.stripe.units() == {"acme": 7}
    assert [step["value"] for step in world.of_kind("confirmed")] == [7]
