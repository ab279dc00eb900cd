"""What guards each credit when a person mends a partition: rows, state and copies, and the sums afterwards.

The real repairs and the real audit, on a world without servers: what they ask the ledger is answered here.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
from tests.metering_world import LENGTH, TOTAL_KEY, World
from tests.simulation.worker import CODECS

from meterline.domain.twins import Copy, judge_copies, twin_correction
from meterline.domain.windows import SkuTotal
from meterline.errors import PartitionHalted
from meterline.ledger.repair_queries import RowSummary, StateWindow
from meterline.metering import repair_ledger
from meterline.metering.repair_evidence import Evidence, RepairTools, Statements
from meterline.metering.repair_ledger import insert_missing, plan_ledger
from meterline.metering.repair_state import plan_state
from meterline.metering.state import Meta, aggregate_key, aggregate_value, meta_key, parse_aggregate_key


class MendedWorld(World):
    """A world whose worker is gone, and a person with the commands."""

    def __init__(self):
        super().__init__()
        self.said, self.said_until, self.told = {}, -1, {}

    # -- what was published, in full

    def _publish(self, output):
        super()._publish(output)
        if output.topic == "usage.windows":
            said = CODECS["usage-window"].decode(output.value)
            skus = {sku.pop("sku"): SkuTotal(**sku) for sku in said["skus"]}
            self.told[said["window_start"], said["client_id"]] = said["cutoff_offset"], skus
        if output.topic != "usage.totals":
            return
        if output.key.startswith(TOTAL_KEY):
            said = CODECS["usage-total"].decode(output.value)
            names = ("count", "credits_micro", "free_count", "free_credits_micro")
            self.said[said["client_id"]] = SkuTotal(*(said[name] for name in names))
        else:
            self.said_until = CODECS["usage-progress"].decode(output.value)["published_until"]

    def evidence(self):
        said = Statements(self.said_until, 0, dict(self.said), frozenset(self.dead_letters))
        return Evidence(self.range(), dict(self.changelog), said)

    # -- the ledger, asked by repairs

    def lifetime_totals(self, topic_id, _, until):
        sums = defaultdict(SkuTotal)
        for row in self._of(topic_id, 0, until):
            sums[row["client_id"]].count += 1
            sums[row["client_id"]].credits_micro += row["credits_micro"]
        return dict(sums)

    def client_totals(self, topic_id, partition, until):
        last = {row["client_id"]: row["offset"] for row in self._rows_in_order(topic_id, until)}
        sums = self.lifetime_totals(topic_id, partition, until)
        return {client: (total, last[client]) for client, total in sums.items()}

    def row_summary(self, topic_id, _, until):
        rows = self._rows_in_order(topic_id, until)
        if not rows:
            return None
        newest = (max(row[name] for row in rows) for name in ("occurred_at", "appended_at"))
        return RowSummary(len(rows), rows[0]["offset"], rows[-1]["offset"], *newest)

    def event_offsets(self, topic_id, _, first, last):
        return {row["offset"] for row in self._of(topic_id, 0, last) if row["offset"] >= first}

    def told_windows(self, _topic_id, _partition, first_start, last_start):
        return {key: told for key, told in self.told.items() if first_start <= key[0] <= last_start}

    def published_windows(self, *_):
        return sorted({(start, start + LENGTH) for _, start in self.windows})

    def state_windows(self, topic_id, _, until, lengths, ended_since):
        windows = {}
        for start, client, sku, *sums in self.kept_windows(topic_id, 0, until, 0, lengths):
            total = SkuTotal(*sums)
            said, _ = self.windows.get((client, start), (-1, 0))
            rows = [row for row in self._rows_in_order(topic_id, until) if row["client_id"] == client]
            last = max(row["offset"] for row in rows if lengths.start_of(row["occurred_at"]) == start)
            if lengths.end_of(start) > ended_since or last > said:
                windows.setdefault((start, client), StateWindow({}, last, said)).skus[sku] = total
        return windows

    def _rows_in_order(self, topic_id, until):
        return sorted(self._of(topic_id, 0, until), key=lambda row: row["offset"])

    # -- the commands

    def repair_tools(self):
        kafka = SimpleNamespace(registry_url=None)
        asker = SimpleNamespace(ask=lambda question, *args: getattr(self, question.__name__)(*args))
        return RepairTools(kafka, self.options, asker, 1)

    def repair_state(self, gap=None):
        """`meterline repair state`; whether it was done."""
        try:
            plan = plan_state(self.repair_tools(), self.evidence(), gap)
        except PartitionHalted:
            return False
        for key, value in plan.changelog if plan is not None else ():
            if value is None:
                self.changelog.pop(key, None)
            else:
                self.changelog[key] = value
        return True

    def repair_ledger(self, first=None, last=None):
        """`meterline repair ledger`; whether it was done."""
        try:
            plan = plan_ledger(self.repair_tools(), self.evidence(), first, last)
            insert_missing(self.repair_tools(), plan, None)
        except PartitionHalted:
            return False
        return True

    def lose_row(self, offset):
        return self.rows.pop((self.topic_id, 0, offset))


class Writer:
    """The ledger's writer, of the world that is being mended."""

    def __init__(self, world):
        self._world = world

    async def insert(self, table, columns, data):
        await self._world.insert(table, columns, data, None)

    async def close(self):
        """Nothing is held."""


class Message:
    """A record as confluent-kafka gives it."""

    def __init__(self, record):
        self._record = record

    def offset(self):
        return self._record.offset

    def timestamp(self):
        return self._record.timestamp_type, self._record.timestamp

    def key(self):
        return self._record.key

    def value(self):
        return self._record.value


@pytest.fixture
def world(monkeypatch):
    made = MendedWorld()

    def read_committed(_kafka, _topic, _partition, first):
        yield [Message(record) for record in made.log[first:]]

    monkeypatch.setattr(repair_ledger, "read_committed", read_committed)
    monkeypatch.setattr(repair_ledger, "LedgerWriter", lambda _: Writer(made))
    return made


def test_rows_that_no_total_tells_of_are_missed_before_a_state_is_made_of_the_others(world):
    """Counted a moment ago, and lost by the ledger before their total was published: the state from what is
    left would forget them. Read from the log again they are charged.
    """
    world.append("acme", 1_000)
    world.append("acme", 200)
    world.work(slice_length=1, rests=False)
    assert world.said_until == 0
    world.lose_row(1)

    world.repair_state()
    world.repair_ledger()
    world.work()

    assert world.books() == [{"acme": 1_200}] * 3


def test_a_lost_state_is_not_made_of_fewer_rows_than_were_told(world):
    """The changelog and a row are gone: what was published says that the ledger must be mended first."""
    world.append_some()
    world.work()
    world.changelog.clear()
    world.lose_row(4)

    world.repair_state()
    world.repair_ledger()
    world.repair_state()
    world.append("acme", 17)
    world.work()

    assert world.books() == [world.owed()] * 3
    assert world.owed()["acme"] > 17


def test_a_state_that_was_wrong_says_its_windows_again(world):
    """It may have published what was wrong: the kept windows are told anew, as the ledger has them."""
    world.append_some()
    world.work(rests=False)
    (cutoff, client, start) = max((cutoff, *window) for window, (cutoff, _) in world.windows.items())
    world.windows[client, start] = cutoff, 1
    key = aggregate_key(0, start, client, "gpu")
    assert parse_aggregate_key(key)[0] == start
    assert key in world.changelog, "kept"
    world.changelog[key] = aggregate_value(SkuTotal(1, 1))

    assert world.repair_state()
    world.append("acme", 17)
    world.work()

    assert world.books() == [world.owed()] * 3


@pytest.mark.parametrize("rests", [False, True], ids=["windows kept", "windows forgotten"])
def test_a_copy_does_not_take_the_place_of_its_lost_first(world, rests):
    """Read again from behind the first, the copy looks like an event: refused, until the range holds both."""
    world.append_some()
    world.work(rests=rests)
    lost = world.lose_row(4)
    assert lost["credits_micro"] == 1_002

    world.repair_ledger(first=12)
    world.repair_ledger()
    world.work()

    assert world.books() == [world.owed()] * 3
    assert sorted(offset for _, _, offset in world.rows) == sorted(world.accepted)


def test_a_range_is_decided_with_what_the_ledger_has_below_it(world):
    """The first stands there: its copy, in the range, is none of the missing rows."""
    world.append_some()
    world.work()
    world.lose_row(14)

    world.repair_ledger(first=12)
    world.work()

    assert world.books() == [world.owed()] * 3


def test_what_retention_took_is_accepted_by_a_person_and_nothing_else_is_lost(world):
    """Records that nobody counted are gone: none is passed by in silence. With the exact gap accepted every
    other credit is charged, once, and the gap is in the counters.
    """
    world.append_some()
    world.work()
    applied = len(world.log) - 1
    for _ in range(6):
        world.append("acme", 50)
    world.log_start = applied + 4
    before = world.books()

    world.work()

    assert world.books() == before
    assert f"offsets {applied + 1}..{applied + 3} are gone" in world.halted
    for wrong in (None, (applied + 1, applied + 2), (applied, applied + 3)):
        assert not world.repair_state(wrong)
    assert world.repair_state((applied + 1, applied + 3))
    world.work()
    for gone in range(applied + 1, applied + 4):
        del world.accepted[gone]
    assert world.books() == [world.owed()] * 3
    assert Meta.from_bytes(world.changelog[meta_key(0)]).counters.unknown == 3


# -- twins


class Audited(World):
    """A partition with copies that metering can't recognise, and an audit."""

    def audit(self):
        """`meterline audit twins`: what it publishes is appended to the log; how many."""
        corrected = {
            (r["client_id"], r["corrects_topic_id"], r["corrects_partition"], r["corrects_offset"])
            for r in self.rows.values()
            if r["corrects_event_id"]
        }
        copies = defaultdict(list)
        for row in self.rows.values():
            names = ("topic_id", "partition", "offset")
            is_corrected = (row["client_id"], *(row[name] for name in names)) in corrected
            facts = (is_corrected if name == "is_corrected" else row[name] for name in Copy._fields)
            copies[row["client_id"], row["event_id"]].append(Copy(*facts))
        found = [copy for same in copies.values() for copy in judge_copies(same).twins]
        for copy in found:
            self.append_event(twin_correction(copy))
        return len(found)


def test_twins_are_taken_back_once_however_often_they_are_looked_for():
    """Each copy by its place; also by audits so far apart that metering can't recognise the second one's
    corrections.
    """
    world = Audited()
    world.options = world.options.model_copy(update={"dedupe_horizon_ms": 60_000})
    horizon = 60_000 // 300 + 1
    for _ in range(3):
        world.append("acme", 1_000, "task")
        for _ in range(horizon):
            world.append("other", 1)
    world.work(slice_length=100)
    assert world.books()[0]["acme"] == 3_000

    for looks in range(1, 4):
        world.audit()
        for _ in range(horizon):
            world.append("other", 1)
        world.work(slice_length=100)

        assert world.books() == [{"acme": 1_000, "other": (3 + looks) * horizon}] * 3
