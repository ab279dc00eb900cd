"""From intents to answers: nothing unwritten is sent, nothing unknown is forgotten."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from tests.hand_clock import HandClock

from meterline.billing.outbound import BACKOFF_MS_MAX, BUSY_MS, PAUSED_MS, Outbound
from meterline.billing.outcomes import Answer, Outcome
from meterline.billing.state import BillingState, Meta
from meterline.billing.switches import Switch, Switches
from meterline.domain.account_books import AccountBooks, MeterTerms, Terms
from meterline.domain.billing import RESEND_MAX_MS
from meterline.domain.clients import Client
from meterline.domain.usage_records import RecordState, UsageRecord
from meterline.errors import PartitionHalted
from meterline.ledger.tables import USAGE_RECORD_LOG_COLUMNS

NOW = 1_000_000_000_000
COLUMNS = USAGE_RECORD_LOG_COLUMNS[4:]


def record(name, customer="cus_1"):
    numbers = {"map_version": 1, "source_partition": 0, "cutoff_offset": 7, "value": 3}
    return UsageRecord(
        identifier=name,
        client_id="acme",
        meter="credits",
        period_start=NOW - 10**9,
        period_end=NOW + 10**9,
        window_id="00" * 16,
        window_start=NOW - 2_000,
        window_end=NOW - 1_000,
        source_topic_id="topic",
        event_name="credits",
        customer=customer,
        event_timestamp=NOW // 1000,
        **numbers,
    )


class FakeSender:
    """Answers what it is told, and keeps what it was asked."""

    def __init__(self):
        self.space, self.busy, self.sent, self.released = 10, set(), [], []
        self.answer = Outcome(Answer.ACCEPTED, request_id="req_1")
        self.owned = set()

    def own(self, partition):
        self.owned.add(partition)

    def disown(self, partition):
        self.owned.remove(partition)

    def room(self):
        return self.space

    def reserve(self, lane):
        return lane not in self.busy

    def release(self, lane):
        self.released.append(lane)

    async def send(self, what, committed_at):
        self.sent.append((what, committed_at))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class FakeClients:
    version = 1

    def __init__(self):
        self.client = Client("acme", "cus_1")

    def get(self, _):
        return self.client


class Bench:
    def __init__(self, *records):
        self.clock = HandClock(NOW)
        self.state = BillingState(0, Meta("topic", "local", 1, "digest"))
        for one in records:
            self.state.set_record(one)
        self.sender, self.clients = FakeSender(), FakeClients()
        self.switches = Switches(self.clients)
        self.outbound = self.make()

    def make(self):
        books = AccountBooks(self.state, Terms("local", 1, {"credits": MeterTerms("credits", 1)}))
        return Outbound(self.state, books, switches=self.switches, sender=self.sender, clock=self.clock)

    def round(self, answer=None):
        """Plan, commit, send, settle; what was sent."""
        self.sender.answer = answer or self.sender.answer

        async def once():
            before = len(self.sender.sent)
            self.outbound.start(self.outbound.plan(), 1.5)
            await asyncio.gather(*self.outbound._calls)
            return [what for what, _ in self.sender.sent[before:]]

        sent = asyncio.run(once())
        self.outbound.settle()
        return sent

    def rows(self):
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.state.outbox.values()]
        return [(row["kind"], row["state"], row["reason"]) for row in rows]


def test_nothing_is_sent_before_its_attempt_is_committed():
    """`plan` writes down the attempt and its time; only `start`, after the commit, sends."""
    bench = Bench(record("a"))

    (planned,) = bench.outbound.plan()

    assert bench.sender.sent == []
    assert (planned.state, planned.first_attempt_at) == (RecordState.UNKNOWN, NOW)
    assert bench.state.records["a"] == planned
    assert bench.rows() == [("attempt", "unknown", "")]


def test_an_accepted_record_leaves_the_state():
    """The ledger has its outcome and Stripe's request id."""
    bench = Bench(record("a"))
    bench.round()

    assert bench.state.records == {}
    assert bench.rows() == [("attempt", "unknown", ""), ("outcome", "accepted", "")]
    assert bench.sender.sent[0][1] == 1.5


def test_a_duplicate_is_an_arrival():
    """An earlier attempt had got through."""
    bench = Bench(record("a"))
    bench.round(Outcome(Answer.DUPLICATE, "exists"))

    assert bench.state.records == {}
    assert bench.rows()[-1] == ("outcome", "duplicate", "duplicate")


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        (Outcome(Answer.UNKNOWN, "reset"), "a:0"),
        (Outcome(Answer.RETRY_LATER, "429"), "a:0"),
        (Outcome(Answer.STOP, "401"), "a:0"),
        (Outcome(Answer.UNKNOWN, "500", new_key=True), "a:1"),
    ],
    ids=["unknown", "retry later", "stop", "5xx"],
)
def test_an_open_outcome_is_retried_under_the_same_identifier(answer, key):
    """Everything as it was first sent; only after a 5xx with a new key, for Stripe replays a stored 500."""
    bench = Bench(record("a"))
    (first,) = bench.round(answer)
    assert bench.round() == [], "not without a pause"
    bench.clock.now += BACKOFF_MS_MAX

    (second,) = bench.round(Outcome(Answer.ACCEPTED))

    assert (first.identifier, first.value, first.event_timestamp, first.first_attempt_at) == (
        second.identifier,
        second.value,
        second.event_timestamp,
        second.first_attempt_at,
    )
    assert ("a:0", key) == (first.idempotency_key, second.idempotency_key)
    assert bench.state.records == {}


def test_a_new_key_survives_a_restart():
    """Otherwise the stored 500 would be replayed for ever."""
    bench = Bench(record("a"))
    bench.round(Outcome(Answer.UNKNOWN, "500", new_key=True))
    bench.outbound = bench.make()

    (again,) = bench.round(Outcome(Answer.ACCEPTED))

    assert again.idempotency_key == "a:1"


def test_a_refused_record_is_held_for_good():
    """Stripe will never take it: kept, listed with its reason, not sent again, also after a restart."""
    bench = Bench(record("a"))
    bench.round(Outcome(Answer.REFUSED, "no meter"))
    bench.clock.now += BACKOFF_MS_MAX
    assert bench.round() == []
    bench.outbound = bench.make()

    assert bench.round() == []
    assert (
        bench.state.records["a"].state,
        bench.state.records["a"].held_reason,
    ) == (RecordState.REFUSED, "refused")
    assert bench.rows()[-1] == ("outcome", "refused", "refused")


def test_a_changed_request_halts_the_partition():
    """A record that changed between attempts is a bug; the state still has it."""
    bench = Bench(record("a"))

    with pytest.raises(PartitionHalted, match=r"usage record a differs .* key a:0: params"):
        bench.round(Outcome(Answer.MUTATED, "params"))

    assert "a" in bench.state.records


def test_a_request_that_was_not_made_is_made_at_once():
    """Too late after the commit: a new attempt, and a new commit."""
    bench = Bench(record("a"))
    bench.round(Outcome(Answer.NOT_SENT))

    assert [one.identifier for one in bench.round(Outcome(Answer.ACCEPTED))] == ["a"]


@pytest.mark.parametrize(
    ("change", "now", "reason"),
    [
        ({"first_attempt_at": NOW - RESEND_MAX_MS}, NOW, "unknown_outcome"),
        ({"period_end": NOW - 10**9}, NOW, "invoice_final"),
        ({"event_timestamp": NOW // 1000 - 35 * 86_400}, NOW, "too_old"),
    ],
)
def test_what_must_not_be_sent_any_more_is_held(change, now, reason):
    """Never guessed: listed with its reason."""
    bench = Bench(replace(record("a"), **change))
    bench.clock.now = now

    assert bench.round() == []
    assert bench.state.records["a"].held_reason == reason
    assert bench.rows() == [("held", "held", reason)]


def test_a_restart_sends_what_has_no_outcome():
    """An attempt that was committed and never heard of is unknown, not lost."""
    bench = Bench(
        replace(record("a"), state=RecordState.UNKNOWN, first_attempt_at=NOW - 5), record("b", "cus_2")
    )

    assert [one.identifier for one in bench.round()] == ["a", "b"]
    assert bench.sender.sent[0][0].first_attempt_at == NOW - 5


def test_a_paused_client_keeps_its_records():
    """And sends them soon after the pause."""
    bench = Bench(record("a"))
    bench.clients.client = replace(bench.clients.client, sending_paused=True)
    assert bench.round() == []
    bench.clients.client = replace(bench.clients.client, sending_paused=False)
    bench.clock.now += PAUSED_MS

    assert [one.identifier for one in bench.round()] == ["a"]


@pytest.mark.parametrize("client", ["acme", ""], ids=["the client", "all clients"])
def test_an_ordered_pause_keeps_records_until_it_is_lifted(client):
    """Of one client, or of all."""
    bench = Bench(record("a"))
    bench.switches.set({client: Switch.PAUSED})
    assert bench.round() == []
    bench.switches.set({client: Switch.ON})
    bench.clock.now += PAUSED_MS

    assert [one.identifier for one in bench.round()] == ["a"]


def test_a_record_in_shadow_is_never_sent():
    """Its units are no part of what is ever told or carried, also after sending is on again."""
    bench = Bench(record("a"))
    bench.switches.set({"": Switch.SHADOW})
    assert bench.round() == []
    bench.switches.set({})
    bench.clock.now += PAUSED_MS

    assert bench.round() == []
    assert (bench.state.records, bench.state.account(record("a").account).shadow) == ({}, 3)
    assert bench.rows() == [("outcome", "shadow", "")]


def test_a_record_that_may_have_arrived_waits_in_shadow():
    """Stripe may have its units: they are no shadow's."""
    bench = Bench(replace(record("a"), state=RecordState.UNKNOWN, first_attempt_at=NOW - 5))
    bench.switches.set({"": Switch.SHADOW})

    assert bench.round() == []
    assert bench.state.account(record("a").account).shadow == 0
    assert list(bench.state.records) == ["a"]


def test_a_lane_busy_elsewhere_waits_and_does_not_block():
    """Another partition has a request of this customer under way."""
    bench = Bench(record("a"), record("b", "cus_2"))
    bench.sender.busy = {("cus_1", "credits")}
    assert [one.identifier for one in bench.round()] == ["b"]
    bench.sender.busy = set()
    bench.clock.now += BUSY_MS

    assert [one.identifier for one in bench.round()] == ["a"]


def test_no_more_is_planned_than_there_is_room():
    """The rate is the account's."""
    bench = Bench(*(record(f"r{number}", f"cus_{number}") for number in range(5)))
    bench.sender.space = 2

    assert [one.identifier for one in bench.round()] == ["r0", "r1"]


def test_a_lost_partition_gives_its_reservations_back():
    """Planned and not started: another partition may need the lane."""
    bench = Bench(record("a"))
    bench.outbound.plan()
    bench.outbound.close()

    assert bench.sender.released == [("cus_1", "credits")]
    assert (bench.sender.sent, bench.sender.owned) == ([], set())


def test_a_bug_while_sending_ends_the_next_flush():
    """Never a swallowed task."""
    bench = Bench(record("a"))

    with pytest.raises(ZeroDivisionError):
        bench.round(ZeroDivisionError())
