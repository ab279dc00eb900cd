"""One attempt at a task: when its work may start, what is billed, and when its hold is given back."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta

import pytest

from meterline.domain.events import default_event_id
from meterline.errors import UserError
from meterline.producer import InvalidUsage
from meterline.quota import CreditsExhausted, QuotaUnavailable, ReservationLapsed
from meterline.task.desk import Desk
from meterline.task.errors import SpoolFailed, SpoolFull
from meterline.task.holds import HeldReservations
from meterline.task.meter import Meter
from meterline.task.records import SpooledEvents

JOB = {"client_id": "acme", "sku": "gpu", "credits": 5, "correlation_id": "job-1"}


class Buckets:
    """Notes what it is asked; `answers` holds what a call raises."""

    def __init__(self):
        self.calls = []
        self.answers = {}
        self.slow = {}

    async def _asked(self, name, *details):
        self.calls.append((name, *details))
        if name in self.slow:
            await self.slow[name].wait()
        if name in self.answers:
            raise self.answers[name]

    async def reserve(self, client_id, credits, *, reservation_id, ttl_s):  # noqa: A002 - the library's word
        await self._asked("reserve", client_id, credits, reservation_id, ttl_s)

    async def settle(self, reservation_id, parts, *, final, client_id):
        await self._asked("settle", client_id, reservation_id, parts, final)

    async def void(self, reservation_id, *, client_id):
        await self._asked("void", client_id, reservation_id)

    async def renew(self, reservation_id, ttl_s, *, client_id):
        await self._asked("renew", client_id, reservation_id, ttl_s)

    @property
    def names(self):
        return [call[0] for call in self.calls]


class Kept:
    """A spool of the test's own: durable when `let_go` is set."""

    def __init__(self):
        self.claims = 0
        self.refuses = None
        self.fails = None
        self.spooled = []
        self.let_go = threading.Event()
        self.let_go.set()
        self._records = SpooledEvents()

    def admit(self):
        if self.refuses:
            raise self.refuses
        self.claims += 1

    def release(self):
        self.claims -= 1

    def append(self, records):
        self.spooled.append([self._records.decode(record) for record in records])
        durable = Future()

        def finish():
            self.let_go.wait(10)
            if self.fails:
                durable.set_exception(self.fails)
            else:
                durable.set_result(None)

        threading.Thread(target=finish).start()
        return durable

    @property
    def charged(self):
        return [(e.sku, e.credits_micro // 1_000_000) for group in self.spooled for e, _ in group]


class Office:
    """A meter between the two."""

    def __init__(self, ttl_s=60.0, ttl_spooled_s=300.0):
        self.buckets, self.kept = Buckets(), Kept()
        self.holds = HeldReservations(self.buckets, ttl_s, ttl_spooled_s)
        self.desk = Desk(self.buckets, self.kept, self.holds, ttl_s=ttl_s)
        self.meter = Meter(self.desk, lambda: True)

    def task(self, **changed):
        return self.meter.task(**JOB | changed)


@pytest.fixture
def office():
    return Office()


def test_success_without_a_charge_costs_what_was_reserved(office):
    """One event, final, under the reservation and the deterministic id; its hold is settled, not voided."""

    async def work():
        async with office.task() as task:
            assert office.buckets.names == ["reserve"]
            assert office.kept.spooled == []
        return task

    task = asyncio.run(work())
    ((event, final),) = office.kept.spooled[0]

    assert office.buckets.calls == [("reserve", "acme", 5, task.reservation_id, 60.0)]
    assert (event.sku, event.credits_micro, final) == ("gpu", 5_000_000, True)
    assert event.event_id == default_event_id("acme", "job-1", "gpu")
    assert event.reservation_id == task.reservation_id
    assert office.kept.claims == 0
    assert len(office.holds) == 1  # renewed until the drainer has settled it


def test_charges_replace_the_reserved_cost(office):
    """Several SKUs under one reservation, kept together; the last one is final."""

    async def work():
        async with office.task() as task:
            first = task.charge(sku="gpu", credits=1)
            second = task.charge(sku="gpu", credits=1)
            task.charge(sku="tokens", credits="2", attributes={"model": "m"})
            return [first, second]

    ids = asyncio.run(work())

    assert office.kept.charged == [("gpu", 1), ("gpu", 1), ("tokens", 2)]
    assert [final for _, final in office.kept.spooled[0]] == [False, False, True]
    assert ids == [default_event_id("acme", "job-1", "gpu", item) for item in (0, 1)]
    assert len({event.reservation_id for event, _ in office.kept.spooled[0]}) == 1


def test_a_re_run_has_the_same_events_under_another_reservation(office):
    """It never touches the hold of an older attempt, and is billed once."""

    async def attempt():
        async with office.task() as task:
            task.charge(sku="gpu", credits=1)
            task.charge(sku="gpu", credits=2)
        return task.reservation_id

    rids = [asyncio.run(attempt()), asyncio.run(attempt())]
    ids = [[event.event_id for event, _ in group] for group in office.kept.spooled]

    assert rids[0] != rids[1]
    assert all(rid.startswith("job-1:") for rid in rids)
    assert ids[0] == ids[1]


def test_the_longest_correlation_id_has_a_reservation(office):
    """Reservation ids have the same limit."""

    async def attempt():
        async with office.task(correlation_id="j" * 200):
            pass

    asyncio.run(attempt())
    ((event, _),) = office.kept.spooled[0]

    assert len(event.reservation_id) < 60


def test_without_credits_the_work_does_not_start(office):
    """The refusal comes through as it is; nothing was held, so nothing is voided."""
    office.buckets.answers["reserve"] = CreditsExhausted("acme", 5, 2)

    async def work():
        async with office.task():
            raise AssertionError("it started")

    with pytest.raises(CreditsExhausted):
        asyncio.run(work())
    assert office.buckets.names == ["reserve"]
    assert (office.kept.claims, office.kept.spooled) == (0, [])


@pytest.mark.parametrize("refusal", [SpoolFull("full"), SpoolFailed("broken")])
def test_without_room_the_work_does_not_start(office, refusal):
    """And no credits are asked for."""
    office.kept.refuses = refusal

    async def work():
        async with office.task():
            raise AssertionError("it started")

    with pytest.raises(type(refusal)):
        asyncio.run(work())
    assert office.buckets.calls == []


def test_an_unknown_answer_is_voided_and_the_work_does_not_start(office):
    """Redis may have granted it after we gave up waiting."""
    office.buckets.answers["reserve"] = QuotaUnavailable("no answer")

    async def work():
        with pytest.raises(QuotaUnavailable):
            async with office.task():
                raise AssertionError("it started")
        await office.desk.end()

    asyncio.run(work())
    assert office.buckets.names == ["reserve", "void"]
    assert office.kept.claims == 0


def test_being_cancelled_while_reserving_voids(office):
    """What the cancelled call did stays done."""
    office.buckets.slow["reserve"] = asyncio.Event()

    async def work():
        async with office.task():
            raise AssertionError("it started")

    async def main():
        working = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await office.desk.end()

    asyncio.run(main())
    assert office.buckets.names == ["reserve", "void"]
    assert (office.kept.claims, office.kept.spooled, len(office.holds)) == (0, [], 0)


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_an_exception_before_any_cost_gives_the_hold_back(office, error):
    """Cancellation too; the exception goes on."""

    async def work():
        async with office.task():
            raise error

    async def main():
        with pytest.raises(type(error)):
            await work()

    asyncio.run(main())
    assert office.buckets.names == ["reserve", "void"]
    assert (office.kept.claims, office.kept.spooled, len(office.holds)) == (0, [], 0)


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_an_exception_after_a_charge_bills_what_arose(office, error):
    """And nothing more; the hold is settled with it, never voided."""

    async def work():
        async with office.task() as task:
            task.charge(sku="tokens", credits=2)
            raise error

    async def main():
        with pytest.raises(type(error)):
            await work()

    asyncio.run(main())
    assert office.kept.charged == [("tokens", 2)]
    assert office.kept.spooled[0][0].final
    assert office.buckets.names == ["reserve"]


def test_the_block_is_left_when_the_usage_is_durable(office):
    """Not before: what is not yet durable can still be lost."""
    office.kept.let_go.clear()
    left = []

    async def work():
        async with office.task():
            pass
        left.append(True)

    async def main():
        working = asyncio.create_task(work())
        await asyncio.sleep(0.05)
        assert not left
        assert len(office.kept.spooled) == 1
        office.kept.let_go.set()
        await working

    asyncio.run(main())
    assert left == [True]


def test_being_cancelled_during_the_spool_write_never_voids(office):
    """The write goes on, the hold stands, and is renewed until the drainer settles it."""
    office.kept.let_go.clear()

    async def work():
        async with office.task():
            pass

    async def main():
        working = asyncio.create_task(work())
        await asyncio.sleep(0.05)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert office.kept.claims == 1
        office.kept.let_go.set()
        await office.desk.end()

    asyncio.run(main())
    assert office.buckets.names == ["reserve"]
    assert (office.kept.claims, office.kept.charged, len(office.holds)) == (0, [("gpu", 5)], 1)


def test_being_cancelled_while_voiding_still_voids(office):
    """The hold must not wait for its deadline because of a second Ctrl-C."""
    office.buckets.slow["void"] = asyncio.Event()

    async def work():
        async with office.task():
            raise ZeroDivisionError

    async def main():
        working = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        office.buckets.slow["void"].set()
        await office.desk.end()

    asyncio.run(main())
    assert office.buckets.names == ["reserve", "void"]
    assert office.kept.claims == 0


def test_usage_that_is_not_durable_is_told_and_not_voided(office):
    """Some of its bytes may have reached the disk."""
    office.kept.fails = SpoolFailed("the disk is broken")

    async def work():
        async with office.task():
            pass

    with pytest.raises(SpoolFailed):
        asyncio.run(work())
    assert office.buckets.names == ["reserve"]
    assert (office.kept.claims, len(office.holds)) == (0, 0)


def test_what_went_wrong_first_stays_what_is_raised(office):
    """With a note that its cost is not durable either."""
    office.kept.fails = SpoolFailed("the disk is broken")

    async def work():
        async with office.task() as task:
            task.charge(sku="gpu", credits=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        asyncio.run(work())
    assert raised.value.__notes__ == ["the disk is broken"]


@pytest.mark.parametrize(
    "wrong",
    [{"credits": -1}, {"credits": 0.5}, {"sku": ""}, {"client_id": "c" * 201}, {"attributes": {"a": 1}}],
)
def test_usage_that_could_never_be_published_is_refused_before_the_work(office, wrong):
    """Not in the drainer, which could only stand still."""

    async def work():
        async with office.task(**wrong):
            raise AssertionError("it started")

    with pytest.raises(InvalidUsage):
        asyncio.run(work())
    assert office.buckets.calls == []
    assert office.kept.claims == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"credits": -1},
        {"credits": "0.0000001"},
        {"sku": "s" * 201},
        {"sku": 7},
        {"item": -1},
        {"occurred_at": datetime.now(UTC) + timedelta(hours=1)},
        {"attributes": {f"{n:03}": "v" * 4096 for n in range(65)}},
        {"attributes": {f"{n:03}" + "k" * 190: "\U0001f600" * 1025 for n in range(64)}},
    ],
)
def test_a_wrong_charge_is_refused_at_once_and_bills_nothing(office, wrong):
    """The ones before it stand."""

    async def work():
        async with office.task() as task:
            task.charge(sku="tokens", credits=1)
            task.charge(**{"sku": "tokens", "credits": 1} | wrong)

    with pytest.raises(InvalidUsage):
        asyncio.run(work())
    assert office.kept.charged == [("tokens", 1)]


def test_two_charges_under_one_id_are_refused_when_they_differ(office):
    """Only one of them would ever be billed. The same one again is a repetition."""

    async def work():
        async with office.task() as task:
            task.charge(sku="gpu", credits=1, item=3)
            task.charge(sku="gpu", credits=1, item=3)
            with pytest.raises(InvalidUsage, match="already published"):
                task.charge(sku="gpu", credits=2, item=3)
            task.charge(sku="gpu", credits=2)

    asyncio.run(work())
    events = [event for event, _ in office.kept.spooled[0]]
    assert [(event.event_id, event.credits_micro) for event in events] == [
        (default_event_id("acme", "job-1", "gpu", 3), 1_000_000),
        (default_event_id("acme", "job-1", "gpu", 4), 2_000_000),
    ]


def test_a_task_never_leaves_more_than_the_spool_takes(office, monkeypatch):
    """Told at the charge, not when it is too late."""
    monkeypatch.setattr("meterline.task.attempt.TASK_BYTES_MAX", 2_000)

    async def work():
        async with office.task() as task:
            for _ in range(100):
                task.charge(sku="gpu", credits=1)

    with pytest.raises(InvalidUsage, match="make several tasks"):
        asyncio.run(work())
    assert 2 < len(office.kept.charged) < 100


def test_charges_belong_inside_the_block(office):
    """After it, the reservation is final."""

    async def work():
        async with office.task() as task:
            pass
        task.charge(sku="gpu", credits=1)

    with pytest.raises(UserError, match="inside the `with` block"):
        asyncio.run(work())


def test_a_task_is_entered_once(office):
    """Another attempt needs another reservation."""

    async def work():
        task = office.task()
        async with task:
            pass
        async with task:
            pass

    with pytest.raises(UserError, match="entered once"):
        asyncio.run(work())


def test_threads_may_charge(office):
    """Work is often done in an executor; every charge has its own id."""

    async def work():
        async with office.task() as task:
            await asyncio.gather(*(asyncio.to_thread(task.charge, sku="gpu", credits=1) for _ in range(200)))

    asyncio.run(work())
    assert len({event.event_id for event, _ in office.kept.spooled[0]}) == 200


def test_a_closed_meter_takes_no_work(office):
    """Its drainer is gone."""

    async def work():
        await office.desk.end()
        async with office.task():
            raise AssertionError("it started")

    with pytest.raises(UserError, match="closed"):
        asyncio.run(work())


def test_holds_are_renewed_while_the_work_runs():
    """Well before their deadline; and not after they were voided."""
    office = Office(ttl_s=0.3)

    async def work():
        async with office.task():
            await asyncio.sleep(0.5)
            assert office.buckets.names.count("renew") >= 3
            raise ZeroDivisionError

    async def main():
        renewing = asyncio.create_task(office.holds.run())
        with pytest.raises(ZeroDivisionError):
            await work()
        count = office.buckets.names.count("renew")
        await asyncio.sleep(0.3)
        renewing.cancel()
        assert office.buckets.names.count("renew") == count

    asyncio.run(main())


def test_a_spooled_hold_is_renewed_for_longer():
    """So that it outlives a restart of the process."""
    office = Office(ttl_s=0.2, ttl_spooled_s=120)

    async def main():
        async with office.task():
            pass
        await asyncio.sleep(0.1)
        await office.holds.renew_due()

    asyncio.run(main())
    assert [call[3] for call in office.buckets.calls if call[0] == "renew"] == [120]


@pytest.mark.parametrize("error", [QuotaUnavailable("away"), ReservationLapsed("acme", "r")])
def test_a_hold_that_is_not_renewed_does_not_end_the_work(error):
    """The log charges what is done. It is tried again soon."""
    office = Office(ttl_s=0.2)
    office.buckets.answers["renew"] = error

    async def main():
        renewing = asyncio.create_task(office.holds.run())
        began = time.monotonic()
        async with office.task():
            await asyncio.sleep(0.3)
        renewing.cancel()
        return time.monotonic() - began

    asyncio.run(main())
    assert office.buckets.names.count("renew") >= 3
    assert office.kept.charged == [("gpu", 5)]
