"""The rules of billing against a naive account of the same quarter: nothing lost, nothing told twice.

Four periods of one client, windows from two partitions, snapshots late, repeated and falling, answers lost,
records rejected afterwards with or without a notice, crashes after each commit. The naive account adds up
what was used and what Stripe counted; it shares no code with the rules.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.account_store import AccountStore

from meterline.domain.account_books import About, AccountBooks, Comparison, MeterTerms, Terms
from meterline.domain.accounts import AccountKey
from meterline.domain.billing import reason_not_to_send
from meterline.domain.usage_records import RecordState
from meterline.domain.windows import WindowRef

HOUR = 3_600_000
DAY = 24 * HOUR
UNIT = 10
PERIODS, PERIOD, WINDOW = 4, 3 * DAY, 12 * HOUR
GRACE, MARGIN = 72 * HOUR, 10 * 60_000
LAG, MEMORY = 3 * HOUR, 24 * HOUR
ALL_ARRIVES = 48 * HOUR
"""23 hours of an unknown outcome, the absence after them, or a day of a silent rejection, and the lag."""
START = 20_000 * DAY
TERMS = Terms("local", 1, {"credits": MeterTerms("c", UNIT)}, GRACE)


class Stripe:
    """Counts an identifier once within its memory; rejects afterwards; its summaries are late."""

    def __init__(self):
        self.known, self.counted, self.rejected = {}, [], []

    def post(self, record, now, *, reject):
        if now - self.known.get(record.identifier, -MEMORY) < MEMORY:
            return RecordState.DUPLICATE
        self.known[record.identifier] = now
        if reject:
            self.rejected.append((record.account, record.day, record.identifier))
        else:
            self.counted.append((record.identifier, record.value, record.event_timestamp * 1000, now))
        return RecordState.ACCEPTED

    def summary(self, start, end, now):
        return sum(v for _, v, stamp, at in self.counted if start <= stamp < end and at <= now - LAG)

    def invoice(self, number):
        start, final = START + number * PERIOD, START + (number + 1) * PERIOD + GRACE
        within = [v for _, v, stamp, at in self.counted if start <= stamp < start + PERIOD and at < final]
        return max(0, sum(within))


def key_of(number):
    return AccountKey("acme", "credits", START + number * PERIOD, START + (number + 1) * PERIOD, "cus_1")


class Billing(RuleBasedStateMachine):
    """One client's quarter."""

    @initialize()
    def begin(self):
        self.stripe, self.durable = Stripe(), AccountStore()
        self.now, self.closed, self.said, self.known = START + HOUR, 0, [], {}
        self.used, self.assigned = Counter(), Counter()
        self.moved_in, self.moved_out = Counter(), Counter()
        self.carried = Counter()
        self.invoiced, self.notices, self.disturbed_at = {}, set(), self.now

    # -- what the rules do, one commit each

    def work(self):
        store = self.durable.copy()
        return store, AccountBooks(store, TERMS)

    def own_period(self, number):
        """Where a window's usage goes, as the naive account has it."""
        final = START + (number + 1) * PERIOD + GRACE
        open_ = number >= self.closed and self.now < final - MARGIN
        return number if open_ else (self.now - START) // PERIOD

    @rule(back=st.integers(0, 8), partition=st.integers(0, 1), more=st.integers(-30, 40))
    def use(self, back, partition, more):
        """A window's total grows or falls, and a snapshot says so."""
        newest = min((self.now - START) // WINDOW, PERIODS * PERIOD // WINDOW - 1)
        window = max(0, newest - back)
        name = (window, partition)
        self.used[name] = max(0, self.used[name] + more)
        self.said.append((name, len(self.said) + 1, self.used[name]))

    @precondition(lambda self: self.said)
    @rule(pick=st.integers(0, 10**6), last=st.booleans())
    def deliver(self, pick, last):
        """Any snapshot at any time, again and out of order."""
        self.take(self.said[-1] if last else self.said[pick % len(self.said)])

    def take(self, said):
        (window, partition), cutoff, total = said
        known_cutoff, known_total = self.known.get((window, partition), (0, 0))
        if cutoff <= known_cutoff:
            return
        own = (window * WINDOW) // PERIOD
        number = self.own_period(own)
        store, books = self.work()
        assert books.takes(key_of(own), self.now) == (number == own)
        ref = WindowRef("acme", START + window * WINDOW, START + (window + 1) * WINDOW, "topic", partition)
        books.advance(key_of(number), total - known_total, About.window(ref, cutoff), self.now)
        self.durable, self.known[window, partition] = store, (cutoff, total)
        self.assigned[number] += total - known_total
        if number != own:
            self.moved_out[own] += total - known_total
            self.moved_in[number] += total - known_total

    @precondition(lambda self: self.durable.records)
    @rule(
        pick=st.integers(0, 10**6),
        outcome=st.sampled_from(["heard", "heard", "heard", "lost before", "lost after", "busy", "refused"]),
        reject=st.booleans(),
    )
    def send(self, pick, outcome, reject):
        """A request: its answer is heard, or never; a rejection comes after a good answer."""
        records = list(self.durable.records.values())
        self.request(records[pick % len(records)], outcome, reject=reject and pick % 3 == 0)
        self.disturbed_at = self.now

    def request(self, record, outcome, *, reject):
        if record.held_reason:
            return
        store, books = self.work()
        if reason := reason_not_to_send(record, self.now, GRACE):
            books.hold(record, reason, self.now)
            self.durable = store
            return
        attempt = books.attempt(record, self.now)
        self.durable = store
        if outcome in {"lost before", "busy", "refused"}:
            answer = None
        else:
            answer = self.stripe.post(attempt, self.now, reject=reject)
        store, books = self.work()
        if outcome == "heard":
            books.landed(attempt, answer, self.now)
        elif outcome == "refused":
            books.refused(attempt, self.now)
        elif outcome == "busy":
            books.unanswered(attempt, self.now, new_key=True)
        else:
            return
        self.durable = store

    @precondition(lambda self: self.stripe.rejected)
    @rule(pick=st.integers(0, 10**6))
    def hear_of_a_rejection(self, pick):
        """Also twice, and long after."""
        key, day, identifier = self.stripe.rejected[pick % len(self.stripe.rejected)]
        store, books = self.work()
        books.notice(key, day, About.account(key), self.now, detail=identifier)
        self.durable = store

    @rule(number=st.integers(0, PERIODS - 1))
    def compare(self, number):
        """Each day that wants a look, against a summary that is hours old."""
        key = key_of(number)
        for day in list(self.durable.days(key)):
            store, books = self.work()
            if not books.needs_look(key, day, self.now):
                continue
            start = max(day * DAY, key.period_start)
            found = self.stripe.summary(start, min((day + 1) * DAY, key.period_end), self.now)
            what, _ = books.compare(key, day, found, self.now)
            assert what is not Comparison.FOREIGN
            self.durable = store

    @rule()
    def close(self):
        """The oldest period whose invoice is final."""
        number = self.closed
        key = key_of(number)
        if number >= PERIODS or self.now < key.period_end + GRACE:
            return
        store, books = self.work()
        if not books.may_close(key, self.now):
            return
        quantity = self.stripe.invoice(number)
        assert not books.foreign_on_invoice(key, quantity)
        current = (self.now - START) // PERIOD
        owned, units = self.assigned[number] + self.carried[number], self.durable.account(key).units
        carry, _ = books.close(key, quantity, key_of(current), self.now)
        self.durable, self.closed, self.invoiced[number] = store, number + 1, quantity
        self.carried[current] += owned - quantity * UNIT
        assert carry.credits_micro == owned - quantity * UNIT
        if key.period_end + GRACE - self.disturbed_at > ALL_ARRIVES:
            assert (quantity, units) == (max(0, owned // UNIT),) * 2, "the period's own invoice"
            assert (carry.late, carry.clipped, carry.not_landed) == (0, 0, 0)

    @rule(hours=st.sampled_from([1, 1, 2, 3, 6, 12, 25]))
    def wait(self, hours):
        self.now = min(self.now + hours * HOUR, START + PERIODS * PERIOD - HOUR)
        self.disturbed_at = self.now  # nothing was sent meanwhile

    # -- what must be true, always

    @invariant()
    def no_identifier_is_counted_twice(self):
        if not hasattr(self, "stripe"):
            return
        counted = Counter(identifier for identifier, *_ in self.stripe.counted)
        assert [name for name, times in counted.items() if times > 1] == []

    @invariant()
    def units_are_the_floor_and_all_of_them_are_somewhere(self):
        if not hasattr(self, "stripe"):
            return
        for number in range(self.closed, PERIODS + 3):
            key = key_of(number)
            account = self.durable.account(key)
            owned = self.assigned[number] + self.carried[number]
            landed = sum(day.landed for day in self.durable.days(key).values())
            open_units = sum(record.value for record in self.durable.open_records(key))
            assert (account.credits_micro, account.units) == (owned, max(0, owned // UNIT))
            assert account.units == landed + open_units

    # -- and in the end

    def teardown(self):
        """Stripe is well again: everything that can arrive does, and each period closes."""
        if not hasattr(self, "stripe"):
            return
        for _ in range((PERIODS + 2) * PERIOD // HOUR):
            for name in sorted(self.used):
                newest = max(said for said in self.said if said[0] == name)
                self.take(newest)
            for record in list(self.durable.records.values()):
                if record.held_reason == "refused":
                    store, books = self.work()
                    books.release(record, self.now, why="")
                    self.durable = store
                else:
                    self.request(record, "heard", reject=False)
            for pick, (_, _, identifier) in enumerate(self.stripe.rejected):
                if identifier not in self.notices and pick % 2:
                    self.notices.add(identifier)
                    self.hear_of_a_rejection(pick)
            for number in range(PERIODS):
                self.compare(number)
            self.close()
            self.no_identifier_is_counted_twice()
            self.units_are_the_floor_and_all_of_them_are_somewhere()
            if self.closed == PERIODS:
                break
            self.now += HOUR
        assert self.closed == PERIODS, "a period never closes"
        self.check_the_identity()

    def check_the_identity(self):
        """Per period: invoice + carried out + moved out - carried in - moved in = what was used in it."""
        out, into = Counter(), Counter()
        for _, step in self.durable.steps:
            number = (step.account.period_start - START) // PERIOD
            if step.kind == "close":
                out[number] -= step.credits_micro
            elif step.kind == "advance" and step.reason == "carry":
                into[number] += step.credits_micro
        for number in range(PERIODS):
            used = sum(v for (window, _), v in self.used.items() if window * WINDOW // PERIOD == number)
            moved = self.moved_out[number] - self.moved_in[number]
            assert used == self.stripe.invoice(number) * UNIT + out[number] + moved - into[number]
        total = sum(self.used.values())
        invoiced = sum(self.stripe.invoice(number) for number in range(PERIODS)) * UNIT
        later = sum(amount for number, amount in self.carried.items() if number >= PERIODS)
        later += sum(amount for number, amount in self.moved_in.items() if number >= PERIODS)
        assert total == invoiced + later


TestBilling = Billing.TestCase
TestBilling.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
