"""What guards each unit on its way to Stripe: a worker dies anywhere, and what was used is paid once.

The real owner of a partition of usage.windows; Stripe, the ledger and the changelog are a few dictionaries.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

from tests.hand_clock import HandClock

from meterline.billing.meters import MeterMap
from meterline.billing.notices import NoticeBoard
from meterline.billing.outcomes import Answer, Outcome
from meterline.billing.owner import BillingOwner, BillingParts
from meterline.billing.switches import Switches
from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import snapshot_to_record
from meterline.domain.clients import Client
from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot
from meterline.errors import PartitionHalted
from meterline.settings import BillingSettings
from meterline.streaming.owner import LogRange

MICRO = 1_000_000
HOUR = 3_600_000
NOW = 500_000 * HOUR
CODEC = RecordCodec("usage-window")
METERS = MeterMap.model_validate(
    {
        "version": 1,
        "meters": [
            {
                "name": "credits",
                "event_name": "c",
                "display_name": "C",
                "unit_credits": "1",
                "skus": ["gpu"],
            }
        ],
    }
)


class Crash(Exception):  # noqa: N818 - what happens, not a fault
    """The worker is killed."""


class Stripe:
    """Counts the first event of each identifier; says of the others that it has them. For a day."""

    def __init__(self):
        self.counted, self.remembered = Counter(), set()

    def take(self, record):
        """Whether it is new."""
        if record.identifier in self.remembered:
            return False
        self.remembered.add(record.identifier)
        self.counted[record.client_id] += record.value
        return True

    def units(self):
        return {client: units for client, units in self.counted.items() if units}


class World:
    """One partition of usage.windows, what is durable, and what the clients owe."""

    version = 1  # of the client registry

    def __init__(self, stripe=None, installation="local"):
        self.stripe, self.installation = stripe or Stripe(), installation
        self.log, self.true, self.newest = [], set(), {}
        self.changelog, self.steps = {}, {}
        self.places, self.dies_at, self.dead, self.halted = 0, None, False, ""

    # -- the log

    def say(self, client, hour, cutoff, micro, *, true=True):
        """A snapshot on usage.windows; one that isn't true is unlike the ledger."""
        ref = WindowRef(client, NOW - hour * HOUR, NOW - (hour - 1) * HOUR, "topic", 0)
        snapshot = WindowSnapshot(ref, cutoff, {"gpu": SkuTotal(1, micro)}, NOW, NOW)
        value = CODEC.encode(snapshot_to_record(snapshot))
        offset = len(self.log)
        self.log.append(SimpleNamespace(offset=offset, timestamp=NOW, key=b"", value=value, headers=()))
        if true:
            self.true.add((ref.window_id, cutoff, micro))
            newest = self.newest.setdefault(client, {})
            newest[ref.start] = max(newest.get(ref.start, (-1, 0)), (cutoff, micro))

    def say_some(self):
        self.say("acme", 5, 3, 7_600_000)
        self.say("other", 5, 4, 400_000)
        self.say("acme", 4, 6, 700_000)
        self.say("liar", 4, 7, 50_000_000, true=False)
        self.say("acme", 5, 9, 9_400_000)
        self.say("other", 4, 10, 700_000)
        self.say("acme", 5, 3, 7_600_000)
        self.say("other", 5, 12, 100_000)
        self.say("acme", 3, 14, 1_850_000)

    def owed_micro(self):
        """By client: the newest true snapshot of each window."""
        return {
            client: sum(micro for _, micro in windows.values()) for client, windows in self.newest.items()
        }

    def owed_units(self):
        return {client: micro // MICRO for client, micro in self.owed_micro().items() if micro >= MICRO}

    # -- what is durable

    def place(self):
        """Before and after all that leaves the process: where to die. The dead do nothing more."""
        self.places += 1
        self.dead = self.dead or self.places == self.dies_at
        if self.dead:
            raise Crash

    async def commit(self, what):
        self.place()
        for key, value in what.changelog:
            if value is None:
                self.changelog.pop(key, None)
            else:
                self.changelog[key] = value
        self.place()

    async def insert(self, table, columns, data):
        self.place()
        if table == "usage_record_log":
            for row in zip(*data, strict=True):
                named = dict(zip(columns, row, strict=True))
                self.steps[named["seq"]] = named
        self.place()

    # -- what billing asks, and how it sends

    def get(self, client_id):
        return Client(client_id, f"cus_{client_id}")

    async def verified(self, snapshots):
        return [
            (one.ref.window_id, one.cutoff_offset, one.billable_credits_micro) in self.true
            for one in snapshots
        ]

    async def next_seq(self, _, __):
        return max(self.steps, default=-1) + 1

    async def switches(self):
        return {}

    async def orders_since(self, _):
        return ()

    async def notices(self, _):
        return ()

    async def subscription_problem(self, _, __):
        return ""

    def room(self):
        return 10

    def reserve(self, _):
        return True

    def release(self, _):
        """Nobody else waits."""

    async def send(self, record, _):
        self.place()
        new = self.stripe.take(record)
        self.place()
        return Outcome(Answer.ACCEPTED if new else Answer.DUPLICATE)

    # -- the worker

    async def _work(self, slice_length):
        settings = BillingSettings(installation_id=self.installation, verify_retries=1)
        clock = HandClock(NOW)
        parts = BillingParts(
            settings,
            CODEC,
            METERS,
            clients=self,
            reader=self,
            writer=self,
            sender=self,
            reads=self,
            board=NoticeBoard(self, clock),
            switches=Switches(self),
            clock=clock,
        )
        owner = BillingOwner(0, parts)
        where = LogRange("cluster", "usage.windows", "windows", 0, 0, len(self.log))
        position = await owner.restore(dict(self.changelog), where, self.commit)
        for _ in range(20):
            records = self.log[position : position + slice_length]
            owner.feed(records)
            position += len(records)
            await owner.flush()
            await asyncio.gather(*owner._outbound._calls)

    def work(self, slice_length=2):
        self.dead = False
        try:
            asyncio.run(self._work(slice_length))
        except Crash:
            pass
        except PartitionHalted as stop:
            self.halted = str(stop)

    def advanced_micro(self):
        """By client: what the steps in the ledger say was absorbed."""
        micro = Counter()
        for step in self.steps.values():
            if step["kind"] == "advance":
                micro[step["client_id"]] += step["credits_micro"]
        return dict(micro)


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


def test_a_lost_changelog_bills_nothing_again():
    """Stripe has forgotten the names by now, the ledger remembers the steps: a fresh start halts."""
    world = World()
    world.say_some()
    world.work()
    before = world.stripe.units()
    world.changelog.clear()
    world.stripe.remembered.clear()

    world.work(slice_length=100)

    assert world.stripe.units() == before
    assert "lost state" in world.halted
