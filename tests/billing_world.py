"""One partition of billing, its real owner, and a world of dictionaries: Stripe, ledger, changelog, a clock.

A worker may die before or after all that leaves its process; time moves by hand; Stripe forgets, loses
answers, rejects afterwards, sums up late, and draws an invoice for each period.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

from tests.hand_clock import HandClock

from meterline.billing.meters import MeterMap
from meterline.billing.notices import NoticeBoard, Told
from meterline.billing.outcomes import Answer, Outcome
from meterline.billing.owner import BillingOwner, BillingParts
from meterline.billing.stripe_reads import Invoice, Notice
from meterline.billing.switches import Switches
from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import snapshot_to_record
from meterline.domain.account_books import About
from meterline.domain.clients import Client, PeriodUnit, period_of
from meterline.domain.windows import SkuTotal, WindowRef, WindowSnapshot
from meterline.errors import PartitionHalted
from meterline.settings import BillingSettings
from meterline.streaming.owner import LogRange

__all__ = ["DAY", "HOUR", "METERS", "MICRO", "MINUTE", "NOW", "Crash", "Stripe", "World"]

MICRO = 1_000_000
MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
NOW = 20_833 * DAY + 8 * HOUR
"""Eight in the morning of some day: far from the ends of days and months."""
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
    """Counts an identifier once while it remembers it, which is for a day.

    Attributes:
        lose: what becomes of the next requests. "before" it arrives, or "after": the answer is lost;
            "reject": accepted, and rejected afterwards, with a notice; "refuse": a 400.
        void: its invoices are.
        takes_ms: how long a request is under way.
    """

    def __init__(self):
        self.known, self.counted, self.notices = {}, [], []
        self.void = False
        self.lose, self.takes_ms, self.grace, self.lag = [], 0, HOUR, HOUR

    def take(self, record, now):
        """Whether an answer comes, and which."""
        lost = self.lose.pop(0) if self.lose else ""
        if lost == "before":
            return None
        if lost == "refuse":
            return Answer.REFUSED
        now += self.takes_ms
        if now - self.known.get(record.identifier, -DAY) < DAY:
            return None if lost == "after" else Answer.DUPLICATE
        self.known[record.identifier] = now
        if lost == "reject":
            self.reject(record, now)
        else:
            self.counted.append((record, now))
        return None if lost == "after" else Answer.ACCEPTED

    def reject(self, record, now):
        """After it was accepted."""
        self.notices.append(Notice(now // 1000, record.idempotency_key, "meter_event_invalid_value: no"))

    def take_back(self, record, now):
        """Reject what summaries have shown already."""
        self.counted = [(one, at) for one, at in self.counted if one is not record]
        self.reject(record, now)

    def units(self):
        """By client, whatever the period."""
        counted = Counter()
        for record, _ in self.counted:
            counted[record.client_id] += record.value
        return {client: units for client, units in counted.items() if units}

    def summary(self, customer, start, end, now):
        return sum(
            record.value
            for record, at in self.counted
            if record.customer == customer
            and start <= record.event_timestamp * 1000 < end
            and at <= now - self.lag
        )

    def invoiced(self, customer, start, end):
        """The quantity of the period's own invoice."""
        return max(
            0,
            sum(
                record.value
                for record, at in self.counted
                if record.customer == customer
                and start <= record.event_timestamp * 1000 < end
                and at < end + self.grace
            ),
        )


class World:
    """One partition of usage.windows, what is durable, and what the clients owe.

    Attributes:
        unit: of the clients' billing periods.
        busy: customers with a request under way; Stripe refuses another one.
        refused: how often it did.
    """

    version = 1  # of the client registry

    def __init__(self, stripe=None, installation="local", unit=PeriodUnit.MONTH):
        self.stripe, self.installation, self.unit = stripe or Stripe(), installation, unit
        self.clock = HandClock(NOW)
        self.log, self.true, self.newest = [], set(), {}
        self.changelog, self.steps = {}, {}
        self.places, self.dies_at, self.dead, self.halted = 0, None, False, ""
        self.reserved, self.busy, self.refused = set(), Counter(), 0
        self.epoch, self.orders, self.meter_ids = 0, [], {"credits": "mtr_1"}

    # -- the log

    def say(self, client, hour, cutoff, micro, *, true=True):
        """A snapshot of the window `hour` hours before NOW; one that isn't true is unlike the ledger."""
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

    async def insert(self, table, columns, data):
        self.place()
        if table == "usage_record_log":
            for row in zip(*data, strict=True):
                named = dict(zip(columns, row, strict=True))
                self.steps[named["seq"]] = named
        self.place()

    # -- what billing asks the ledger and the registry

    def get(self, client_id):
        return Client(client_id, f"cus_{client_id}", period_unit=self.unit)

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
        return list(self.orders)

    async def told(self, _, __, identifiers):
        records = {record.identifier: record for record, _ in self.stripe.counted}
        steps = {step["identifier"]: step for step in self.steps.values() if step["kind"] == "record"}
        found = {}
        for name in set(identifiers) & steps.keys():
            record = records.get(name) or self.sent[name]
            found[name] = Told(record.account, record.day, About.record(record))
        return found

    # -- what billing asks Stripe

    async def notices(self, since_s):
        return [one for one in self.stripe.notices if one.created_s >= since_s]

    async def subscription_problem(self, _, __):
        return ""

    async def summary(self, key, _, start, end):
        return self.stripe.summary(key.customer, start, end, self.clock.now)

    async def invoice(self, key, _):
        final = self.clock.now >= key.period_end + self.stripe.grace
        units = self.stripe.invoiced(key.customer, key.period_start, key.period_end)
        if final and self.stripe.void:
            return Invoice("in_1", problem="invoice_void")
        return Invoice("in_1", units if final else None)

    # -- how it sends

    def own(self, _):
        pass

    def disown(self, _):
        pass

    def room(self):
        return 10

    def reserve(self, lane):
        if lane in self.reserved:
            return False
        self.reserved.add(lane)
        return True

    def release(self, lane):
        self.reserved.discard(lane)

    async def send(self, record, _):
        self.sent = {**getattr(self, "sent", {}), record.identifier: record}
        self.place()
        self.busy[record.lane] += 1
        try:
            await asyncio.sleep(0)  # under way: another request of the customer would be refused
            if self.busy[record.lane] > 1:
                self.refused += 1
                return Outcome(Answer.RETRY_LATER, "409")
            answer = self.stripe.take(record, self.clock.now)
        finally:
            self.busy[record.lane] -= 1
            self.reserved.discard(record.lane)
        self.place()
        return Outcome(answer) if answer else Outcome(Answer.UNKNOWN, "no answer")

    # -- the worker

    async def take_over(self):
        """A worker that owns the partition; the one before it is fenced. And where it reads on."""
        self.epoch += 1
        epoch = self.epoch

        async def commit(what):
            self.place()
            if epoch != self.epoch:
                raise Crash  # the broker refuses it, and the process ends
            for key, value in what.changelog:
                if value is None:
                    self.changelog.pop(key, None)
                else:
                    self.changelog[key] = value
            self.place()

        settings = BillingSettings(installation_id=self.installation, verify_retries=1)
        parts = BillingParts(
            settings,
            CODEC,
            METERS,
            self.meter_ids,
            clients=self,
            reader=self,
            writer=self,
            sender=self,
            reads=self,
            board=NoticeBoard(self, self.clock),
            switches=Switches(self),
            clock=self.clock,
        )
        owner = BillingOwner(0, parts)
        where = LogRange("cluster", "usage.windows", "windows", 0, 0, len(self.log))
        return owner, await owner.restore(dict(self.changelog), where, commit)

    async def flush(self, owner, records=()):
        """One flush, and all that it began beside it."""
        owner.feed(records)
        await owner.flush()
        for _ in range(6):
            await asyncio.sleep(0)

    async def _work(self, slice_length, until, every):
        owner, position = await self.take_over()
        rounds = 0
        while self.clock.now < until if until else rounds < 20:
            records = self.log[position : position + slice_length]
            position += len(records)
            await self.flush(owner, records)
            rounds += 1
            if until:
                self.clock.now += every

    def work(self, slice_length=2, until=0, every=10 * MINUTE):
        """A worker's life: to the end of the log; or, with a time, to then, as the clock is moved on."""
        self.dead = False
        self.reserved.clear()
        self.busy.clear()
        try:
            asyncio.run(self._work(slice_length, until, every))
        except Crash:
            pass
        except PartitionHalted as stop:
            self.halted = str(stop)

    # -- what became of it

    def of_kind(self, *kinds):
        return [step for _, step in sorted(self.steps.items()) if step["kind"] in kinds]

    def advanced_micro(self):
        """By client: what the steps in the ledger say was absorbed of windows."""
        micro = Counter()
        for step in self.of_kind("advance"):
            if step["reason"] != "carry":
                micro[step["client_id"]] += step["credits_micro"]
        return dict(micro)

    def period(self, client, back=0):
        """Start and end of the client's period at NOW, or of one before."""
        period = period_of(self.get(client), NOW)
        for _ in range(back):
            period = period_of(self.get(client), period.start - 1)
        return period.start, period.end

    def invoiced_units(self, client, back=0):
        return self.stripe.invoiced(f"cus_{client}", *self.period(client, back))

    def carried_micro(self, client):
        """By reason: the parts of what the client's closed accounts handed on."""
        parts = Counter()
        for step in self.of_kind("carry_part"):
            if step["client_id"] == client:
                parts[step["reason"]] += step["credits_micro"]
        return dict(parts)

    def balance_micro(self, client):
        """Absorbed - invoiced - what stands in accounts that are not closed: 0, or something was lost."""
        invoiced = sum(step["value"] for step in self.of_kind("close") if step["client_id"] == client) * MICRO
        standing = Counter()
        for step in self.of_kind("advance", "close"):
            if step["client_id"] == client:
                standing[step["period_start"]] += step["credits_micro"]
        closed = {step["period_start"] for step in self.of_kind("close")}
        left = sum(micro for start, micro in standing.items() if start not in closed)
        return self.owed_micro().get(client, 0) - invoiced - left
