"""Which snapshots move money: new, verified, of a known customer; all others wait and are listed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from meterline.billing.intake import Arrived, HeldReason, Intake
from meterline.billing.meters import MeterMap
from meterline.billing.state import BillingState, Meta
from meterline.billing.valuation import Valuation
from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import snapshot_from_record, snapshot_to_record
from meterline.domain.account_books import AccountBooks, Terms
from meterline.domain.clients import Client
from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot
from meterline.ledger.tables import USAGE_RECORD_LOG_COLUMNS
from meterline.settings import BillingSettings

HOUR = 3_600_000
NOW = 500_000 * HOUR
RECHECK, RETRIES = 10_000, 3
CODEC = RecordCodec("usage-window")
COLUMNS = USAGE_RECORD_LOG_COLUMNS[4:]
METERS = {
    "version": 1,
    "meters": [
        {
            "name": "credits",
            "event_name": "c",
            "display_name": "C",
            "unit_credits": "1",
            "skus": ["gpu", "cpu"],
        }
    ],
}


def snapshot(cutoff, credits_micro, client="acme", sku="gpu"):
    ref = WindowRef(client, NOW - 2 * HOUR, NOW - HOUR, "topic", 0)
    return WindowSnapshot(ref, cutoff, {sku: SkuTotal(1, credits_micro)}, NOW, NOW)


class FakeClients:
    def __init__(self):
        self.version, self.known = 1, {"acme": Client("acme", "cus_1")}

    def get(self, client_id):
        return self.known.get(client_id)


class FakeReader:
    """Verifies what it is told to."""

    def __init__(self):
        self.equal, self.asked = True, []

    async def verified(self, snapshots):
        self.asked += [one.cutoff_offset for one in snapshots]
        return [self.equal] * len(snapshots)

    async def next_seq(self, log_id, partition):
        raise NotImplementedError


class Bench:
    def __init__(self):
        self.state = BillingState(0, Meta("topic", "local", 1, "digest"))
        self.clients, self.reader, self.now = FakeClients(), FakeReader(), NOW
        self.restart()

    def restart(self, meters=None):
        mapped = MeterMap.model_validate(meters or METERS)
        books = AccountBooks(self.state, Terms("local", mapped.version, mapped.terms))
        self.intake = Intake(
            self.state,
            Valuation(self.state, mapped, books),
            clients=self.clients,
            reader=self.reader,
            settings=BillingSettings(verify_retries=RETRIES, held_recheck_interval_ms=RECHECK),
            decode=lambda data: snapshot_from_record(CODEC.decode(data)),
        )

    def take(self, *snapshots, later=0):
        self.now += later
        arrived = [Arrived(one, CODEC.encode(snapshot_to_record(one))) for one in snapshots]
        valued = asyncio.run(self.intake.take(arrived, self.now))
        return [record.value for record in valued.records]

    def waiting(self):
        return [(one.reason, one.credits_micro) for one in self.state.waiting.values()]

    def rows(self):
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.state.outbox.values()]
        return [
            (row["kind"], row["reason"], row["credits_micro"])
            for row in rows
            if row["kind"] in {"held", "released"}
        ]


@pytest.fixture
def bench():
    return Bench()


def test_a_new_and_verified_snapshot_is_valued_once(bench):
    """Said again it is worth nothing; a newer one its difference."""
    assert bench.take(snapshot(5, 7_000_000)) == [7]
    assert bench.take(snapshot(5, 7_000_000)) == []
    assert bench.take(snapshot(9, 9_500_000)) == [2]
    assert bench.take(snapshot(5, 7_000_000)) == []
    assert bench.waiting() == []


def test_of_several_snapshots_of_a_window_the_newest_counts(bench):
    """In whatever order they stand in the batch."""
    assert bench.take(snapshot(9, 9_000_000), snapshot(5, 7_000_000)) == [9]
    assert bench.reader.asked == [9]


@pytest.mark.parametrize("client", [None, Client("acme")], ids=["unknown", "without a customer"])
def test_a_client_without_a_customer_is_held_and_released(bench, client):
    """Counted, listed, and billed as soon as the registry says to whom."""
    known = bench.clients.known.pop("acme")
    if client is not None:
        bench.clients.known["acme"] = client
    assert bench.take(snapshot(5, 7_000_000)) == []
    assert bench.waiting() == [(HeldReason.NO_CUSTOMER, 7_000_000)]

    bench.clients.known["acme"] = known
    assert bench.take(later=1) == [], "not looked at before its time"
    bench.clients.version += 1

    assert bench.take(later=1) == [7]
    assert bench.waiting() == []
    assert bench.rows() == [("held", "no_customer", 7_000_000), ("released", "no_customer", 7_000_000)]


def test_a_test_client_needs_no_customer(bench):
    """Its usage is metered and never sent."""
    bench.clients.known["acme"] = Client("acme", test=True)

    assert bench.take(snapshot(5, 7_000_000)) == []
    assert bench.waiting() == []
    assert bench.state.windows[snapshot(5, 0).ref.window_id].cutoff_offset == 5


def test_a_held_window_is_listed_once(bench):
    """However often it is looked at."""
    del bench.clients.known["acme"]
    bench.take(snapshot(5, 7_000_000))
    for _ in range(3):
        bench.take(later=RECHECK)

    assert bench.rows() == [("held", "no_customer", 7_000_000)]
    assert bench.state.waiting[snapshot(5, 0).ref.window_id].since == NOW


def test_a_window_unlike_the_ledger_is_tried_again_then_held_then_released(bench):
    """A lagging replica needs moments; more than that is listed, and released when it is equal."""
    bench.reader.equal = False
    bench.take(snapshot(5, 7_000_000))
    for _ in range(RETRIES - 1):
        bench.take()
    assert bench.waiting() == [(HeldReason.STILL_TRYING, 7_000_000)]
    assert bench.rows() == []

    bench.take()
    assert bench.waiting() == [(HeldReason.UNVERIFIED, 7_000_000)]
    assert bench.reader.asked == [5] * (RETRIES + 1)

    bench.reader.equal = True
    assert bench.take(later=1) == [], "a held window is looked at again at intervals"
    assert bench.take(later=RECHECK) == [7]
    assert bench.rows() == [("held", "unverified", 7_000_000), ("released", "unverified", 7_000_000)]


def test_an_unverified_window_is_worth_nothing(bench):
    """No account moves, no intent is written."""
    bench.reader.equal = False
    bench.take(snapshot(5, 7_000_000))

    assert (bench.state.accounts, bench.state.records, bench.state.windows) == ({}, {}, {})


def test_a_newer_snapshot_supersedes_a_held_one(bench):
    """The held one is never valued: the newer says all it said."""
    bench.reader.equal = False
    for _ in range(RETRIES + 1):
        bench.take(*([snapshot(5, 7_000_000)] if not bench.reader.asked else []))
    bench.take(snapshot(9, 9_000_000))
    assert bench.waiting() == [(HeldReason.STILL_TRYING, 9_000_000)]
    bench.reader.equal = True

    assert bench.take() == [9]
    assert bench.take(snapshot(5, 7_000_000), later=RECHECK) == []


def test_a_held_window_adds_only_what_is_not_yet_billed(bench):
    """What is listed as held is what would be added."""
    bench.take(snapshot(5, 7_000_000))
    bench.reader.equal = False
    bench.take(snapshot(9, 9_000_000))

    assert bench.waiting() == [(HeldReason.STILL_TRYING, 2_000_000)]


def test_an_unmapped_sku_is_held_until_the_file_names_it(bench):
    """Never a silent zero; no part of the window moves before."""
    assert bench.take(snapshot(5, 7_000_000, sku="tpu")) == []
    assert bench.waiting() == [(HeldReason.UNMAPPED_SKU, 7_000_000)]
    assert bench.state.accounts == {}

    meters = {**METERS, "version": 2, "meters": [{**METERS["meters"][0], "skus": ["*"]}]}
    bench.restart(meters)

    assert bench.take() == [7]
    assert bench.rows()[-1] == ("released", "unmapped_sku", 7_000_000)


@pytest.mark.parametrize("held", [False, True], ids=["known", "waiting"])
def test_of_two_snapshots_of_one_cutoff_the_first_stands(bench, held):
    """One of them is no function of the log: an alarm, never a second value."""
    bench.reader.equal = not held
    bench.take(snapshot(5, 7_000_000))
    bench.take(snapshot(5, 8_000_000))
    bench.reader.equal = True

    bench.take(later=RECHECK)

    assert [record.value for record in bench.state.records.values()] == [7]


def test_a_restart_goes_on_with_what_waits(bench):
    """The snapshot's own bytes are in the state."""
    bench.reader.equal = False
    bench.take(snapshot(5, 7_000_000))
    bench.reader.equal = True
    bench.restart()

    assert bench.take() == [7]


def test_one_clients_trouble_holds_nobody_else(bench):
    """In the same batch."""
    bench.clients.known["other"] = replace(bench.clients.known["acme"], client_id="other")
    del bench.clients.known["acme"]

    assert bench.take(snapshot(5, 7_000_000), snapshot(6, 3_000_000, client="other")) == [3]
