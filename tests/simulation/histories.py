"""Histories: what can happen to a metering pipeline, as rules that Hypothesis combines.

After each rule the books must be right; at the end everything is healed and must come to rest, with the same
credits everywhere.
"""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.simulation.books import CHANGELOG, Books
from tests.simulation.model import FIVE_MINUTES_MS, Usage
from tests.simulation.traffic import Traffic
from tests.simulation.world import HORIZON_MS, LENGTH_MS, PARTITIONS, RESTART_S, SETTINGS, World

from meterline.streaming.steps import Step

BILLING_STEPS = {Step.INTENT_IN_LEDGER, Step.ATTEMPT_IN_LEDGER, Step.STRIPE_ANSWERED}
METERING_STEPS = [step for step in Step if step not in BILLING_STEPS]
REST_S_MAX = 90
"""Sessions that end, transactions that time out, restarts one after another: all within this virtual time."""

names = st.sampled_from(["a", "b"])
partitions = st.sampled_from(PARTITIONS)
lags = st.sampled_from([0, 0, 0, 200, 1_000, 1_400, 3_500, 20_000, 90_000, -700, -FIVE_MINUTES_MS])
charges = st.sampled_from(
    [
        # client, SKU, micro-credits, billable, a correction
        ("acme", "gpu", 1_000, True, False),
        ("acme", "cpu", 7, True, False),
        ("acme", "gpu", 500, False, False),
        ("acme", "gpu", -400, True, True),
        ("acme", "gpu", -5, True, False),
        ("zoo", "gpu", 1_001, True, False),
        ("zoo", "gpu", 0, True, False),
    ]
)
drafts = st.tuples(st.integers(0, 9), charges, lags)
LENGTHS_SET_MAX = 8
pauses = st.sampled_from([0, 0.001, 0.003, 0.02, 0.26, 0.6])
"""Before what happens next: shorter than a message, a flush, an interval of flushes."""
settings_of_worlds = st.sampled_from(
    [
        SETTINGS,
        SETTINGS.model_copy(update={"keep_closed_windows_ms": 0, "late_snapshot_interval_ms": 0}),
        SETTINGS.model_copy(update={"allowed_lateness_ms": 500, "grace_ms": 700}),
        SETTINGS.model_copy(update={"keep_closed_windows_ms": 10**9, "late_snapshot_interval_ms": 3_000}),
    ]
)


class MeteringHistories(RuleBasedStateMachine):
    """One machine of two workers, a log of two partitions, and a ledger."""

    world = None
    steps_taken = lengths_set = 0

    @initialize(seed=st.integers(0, 2**16), settings=settings_of_worlds, first=st.sampled_from([0, 5]))
    def begin(self, seed, settings, first):
        self.world = World(seed, settings, first_offset=first)
        self.world.__enter__()
        self.traffic = Traffic(self.world)
        self.books = Books(self.world, self.traffic)
        self.world.advance(0.5)

    # -- producers

    def usage(self, draft):
        number, (client, sku, credits_micro, billable, is_correction), lag = draft
        occurred_at = self.world.wall_ms() - lag
        return Usage(f"e{number}", client, sku, credits_micro, occurred_at, billable, is_correction)

    @rule(partition=partitions, drafts=st.lists(drafts, min_size=1, max_size=4), pause=pauses)
    def publish(self, partition, drafts, pause):
        for draft in drafts:
            self.traffic.publish(partition, self.usage(draft))
        self.world.advance(pause)

    @rule(partition=partitions, data=st.data())
    def publish_again(self, partition, data):
        """A resend, or a task that ran again: another time; perhaps another partitioner, or amount."""
        known = [p.usage for p in self.traffic.models[partition].published if p.usage is not None]
        if not known:
            return
        usage = data.draw(st.sampled_from(known))
        change = data.draw(st.sampled_from(["nothing", "time", "time", "amount", "partition"]))
        if change == "time":
            usage = usage._replace(occurred_at=self.world.wall_ms() - data.draw(lags))
        elif change == "amount":
            usage = usage._replace(credits_micro=usage.credits_micro + 1)
        elif change == "partition":
            partition = 1 - partition
        self.traffic.publish(partition, usage)
        self.world.advance(data.draw(pauses))

    @rule(partition=partitions)
    def publish_poison(self, partition):
        self.traffic.publish(partition, None)

    @rule(partition=partitions, draft=drafts)
    def publish_far_ahead(self, partition, draft):
        usage = self.usage(draft)
        self.traffic.publish(partition, usage._replace(occurred_at=usage.occurred_at + 10**9))

    @rule(partition=partitions, drafts=st.lists(drafts, min_size=1, max_size=3))
    def publish_in_transaction(self, partition, drafts):
        self.traffic.publish_in_transaction(partition, [self.usage(draft) for draft in drafts])

    @rule(partition=partitions, committed=st.booleans())
    def decide_transaction(self, partition, committed):
        self.traffic.decide(partition, committed=committed)

    # -- time

    @rule(pause=pauses)
    def wait(self, pause):
        self.world.advance(pause)

    @rule()
    def idle(self):
        """Long enough for wall time to close windows, and for a session to end."""
        self.world.advance(3.2)

    @rule(ms=st.sampled_from([LENGTH_MS, 5_000, HORIZON_MS, HORIZON_MS + 1_000, FIVE_MINUTES_MS + 6_000]))
    def jump(self, ms):
        """All clocks; so the horizon passes, and an edge where windows change, without hours of idling."""
        self.world.jump(ms)

    # -- processes

    @rule(name=names, restart_s=st.sampled_from([RESTART_S, RESTART_S, 5.0]), pause=pauses)
    def kill(self, name, restart_s, pause):
        self.world.kill(name, restart_s)
        self.world.advance(pause)

    @rule(
        name=names,
        step=st.sampled_from(METERING_STEPS),
        times=st.integers(1, 3),
        what=st.sampled_from(["kill", "kill", "stop"]),
    )
    def plan_at_step(self, name, step, times, what):
        self.world.plans[name, step] = (what, times)

    @rule(name=names, side=st.sampled_from(["request", "answer"]))
    def plan_unknown_commit(self, name, side):
        self.world.commits_to_lose[name] = side

    @rule(name=names, pause=pauses)
    def stop(self, name, pause):
        self.world.workers[name].stop()
        self.world.advance(pause)

    @rule(name=names, pause=pauses)
    def wake(self, name, pause):
        self.world.workers[name].wake()
        self.world.advance(pause)

    @rule(name=names, pause=pauses)
    def leave(self, name, pause):
        """An orderly end; it comes back when something is healed."""
        if self.world.workers[name].is_responsive:
            self.world.workers[name].leave()
        self.world.advance(pause)

    @rule(pause=pauses)
    def rebalance(self, pause):
        self.world.group.rebalance()
        self.world.advance(pause)

    @rule(name=names, pause=pauses)
    def drop_chunk(self, name, pause):
        self.world.workers[name].drop_chunk()
        self.world.advance(pause)

    @rule(name=names, length_ms=st.sampled_from([LENGTH_MS, 2 * LENGTH_MS, 3 * LENGTH_MS]))
    def set_length(self, name, length_ms):
        """A worker has it from its next start on; the other one keeps what it has."""
        if self.lengths_set < LENGTHS_SET_MAX:
            self.lengths_set += 1
            # No two of them from the same time on: that would rightly halt.
            since = datetime.fromtimestamp(self.world.wall_ms() / 1000 + self.lengths_set, UTC)
            changed = {"window_length_ms": length_ms, "window_length_since": since}
            self.world.settings_of[name] = self.world.settings.model_copy(update=changed)

    # -- servers

    @rule(is_away=st.booleans())
    def ledger(self, is_away):
        self.world.ledger.is_away = is_away

    @rule(share=st.sampled_from([0.0, 0.5, 1.0]))
    def ledger_times_out(self, share):
        """The next insert fails, after none, some or all of its rows were stored."""
        self.world.ledger.partial.append(share)

    @rule(partition=partitions, share=st.sampled_from([0.5, 1.0]))
    def compact(self, partition, share):
        log = self.world.broker.logs[CHANGELOG, partition]
        self.world.broker.compact(CHANGELOG, partition, int(log.end * share))

    @rule()
    def heal(self):
        self.world.heal()

    # -- what must hold

    @invariant()
    def the_books_are_right(self):
        if self.world is not None:
            type(self).steps_taken += 1
            self.books.check()

    def teardown(self):
        if self.world is None:
            return
        try:
            self.come_to_rest()
        finally:
            self.world.__exit__()

    def come_to_rest(self):
        come_to_rest(self.world, self.traffic, self.books)


def come_to_rest(world, traffic, books):
    """Heal everything, wait until nothing is open, and judge."""
    for partition in PARTITIONS:
        traffic.decide(partition, committed=True)
    # An event may be five minutes ahead: its window ends only then.
    world.jump(FIVE_MINUTES_MS + 10 * LENGTH_MS)
    started = world.now
    while not books.is_at_rest() and world.now - started < REST_S_MAX:
        world.heal()
        world.advance(1.0)
    books.check_at_rest()
