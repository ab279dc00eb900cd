"""What must be true of the durable things at every moment, and at rest.

Reads the broker's topics as any committed reader would, each record once, and the ledger's rows; compares
them with the models of the input.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from tests.simulation.kafka_client import topic_id_of
from tests.simulation.worker import CODECS, WINDOW_PARTITIONS
from tests.simulation.world import PARTITIONS

from meterline.contracts.records import is_progress_key
from meterline.metering.state import (
    Meta,
    meta_key,
    parse_aggregate_key,
    parse_aggregate_value,
    parse_total_key,
    parse_total_value,
)

CHANGELOG, WINDOWS = "metering-state-changelog", "usage.windows"
TOTALS, DEAD_LETTERS = "usage.totals", "usage.events.dlq"
TOPIC_ID = topic_id_of("usage.events")
END = 2**63


class Books:
    """Judges a world again and again: `check` at any moment, `check_at_rest` when all is done."""

    def __init__(self, world, traffic):
        self._world, self._traffic = world, traffic
        self._read_until = defaultdict(int)
        self._state = {partition: {} for partition in PARTITIONS}
        self._changed = {partition: set() for partition in PARTITIONS}
        self._rows_seen = self._compactions_seen = 0
        self._stored_until = dict.fromkeys(PARTITIONS, -1)
        self.snapshots, self.totals = {}, {}
        self.dead = {partition: {} for partition in PARTITIONS}
        self._progress = {}
        self.expected_halt = None
        """What the text of a halt must hold; None: no partition may halt."""

    def check(self):
        """Nothing that is durable contradicts the log, or anything that was said before."""
        self._traffic.notice_timeouts()
        assert self._world.surprises == []
        halted = {
            p: why for worker in self._world.workers.values() for p, why in worker.engine.halted.items()
        }
        assert all(self.expected_halt and self.expected_halt in why for why in halted.values()), halted
        self._check_rows()
        for partition in PARTITIONS:
            self._read_state(partition)
            self._check_state(partition)
            for record in self._news(DEAD_LETTERS, partition):
                self._check_dead_letter(partition, CODECS["dead-letter"].decode(record.value))
            for record in self._news(TOTALS, partition):
                if is_progress_key(record.key):
                    self._check_progress(partition, CODECS["usage-progress"].decode(record.value))
                else:
                    self._check_total(partition, CODECS["usage-total"].decode(record.value))
        for partition in range(WINDOW_PARTITIONS):
            for record in self._news(WINDOWS, partition):
                self._check_snapshot(CODECS["usage-window"].decode(record.value))

    def check_at_rest(self):
        """Everything is counted, everything is said, and all of them say the same credits."""
        self.check()
        for partition, model in self._traffic.models.items():
            judged = model.published[-1].offset if model.published else None
            meta = self.meta(partition)
            assert judged is None or (meta is not None and meta.applied_offset == judged), partition
            windows = {(partition, *key): model.window(*key, END) for key in model.by_window}
            said = {key: skus for key, (_, skus) in self.snapshots.items() if key[0] == partition}
            assert windows == said
            totals = {(partition, client): model.total(client, END) for client in model.by_client}
            assert totals == {key: sums for key, (_, sums) in self.totals.items() if key[0] == partition}
            assert model.dead == self.dead[partition]
        assert [self._traffic.owed()] * 3 == self.credits()

    def credits(self):
        """Client -> billable micro-credits, as the ledger, the newest snapshots and the newest totals say."""
        rows, windows, totals = Counter(), Counter(), Counter()
        for row in self._world.ledger.rows.values():
            rows[row["client_id"]] += row["credits_micro"] * row["billable"]
        for (_, _, client), (_, skus) in self.snapshots.items():
            windows[client] += sum(sums[1] for sums in skus.values())
        for (_, client), (_, sums) in self.totals.items():
            totals[client] += sums[1]
        return [dict(rows), dict(windows), dict(totals)]

    def is_at_rest(self):
        """Whether every record is accounted and every window, total and dead letter can be read.

        The markers of one transaction are not written at one moment: a reader may see META before the rest.
        """
        self.check()
        for partition, model in self._traffic.models.items():
            meta = self.meta(partition)
            if model.published and (meta is None or meta.applied_offset < model.published[-1].offset):
                return False
            if model.dead.keys() != self.dead[partition].keys():
                return False
            if any(
                self.snapshots.get((partition, *key), (-1,))[0] < events[-1].offset
                for key, events in model.by_window.items()
            ):
                return False
            if any(
                self.totals.get((partition, client), (-1,))[0] < events[-1].offset
                for client, events in model.by_client.items()
            ):
                return False
        return True

    # -- reading

    def _news(self, topic, partition):
        """Committed records not read yet."""
        fetched = self._world.broker.fetch(topic, partition, self._read_until[topic, partition], 10**9)
        self._read_until[topic, partition] = fetched.position
        return fetched.records

    def _read_state(self, partition):
        if self._compactions_seen != self._world.broker.compactions:
            # What was deleted may be gone without a trace: compaction may change no key's newest value.
            kept = {p: self._world.broker.state(CHANGELOG, p) for p in PARTITIONS}
            for number in PARTITIONS:
                self._take_state(number)
            assert kept == self._state
            self._compactions_seen = self._world.broker.compactions
        self._take_state(partition)

    def _take_state(self, partition):
        state, changed = self._state[partition], self._changed[partition]
        for record in self._news(CHANGELOG, partition):
            changed.add(record.key)
            if record.key == meta_key(partition):
                before = self.meta(partition)
                after = Meta.from_bytes(record.value)
                assert before is None or before.applied_offset <= after.applied_offset
                model = self._traffic.models[partition]
                lengths = [(change.starts, change.length_ms) for change in after.lengths.changes]
                if lengths != model.lengths:
                    model.lengthen(lengths, -1 if before is None else before.applied_offset)
            if record.value is None:
                state.pop(record.key, None)
            else:
                state[record.key] = record.value

    def meta(self, partition):
        """Where a partition stands, as committed; None before its first owner."""
        saved = self._state[partition].get(meta_key(partition))
        return None if saved is None else Meta.from_bytes(saved)

    # -- judging

    def _check_rows(self):
        """A row is a function of its record: accepted, and the same however often it is inserted."""
        inserted = self._world.ledger.inserted
        for row in inserted[self._rows_seen :]:
            assert row["topic_id"] == TOPIC_ID
            published = self._traffic.models[row["partition"]].accepted.get(row["offset"])
            assert published is not None, f"a row of offset {row['offset']}, which is not accepted"
            usage = published.usage
            said = (row["event_id"], row["client_id"], row["sku"], row["credits_micro"], row["occurred_at"])
            assert usage[:5] == said
            assert (usage.billable, usage.is_correction) == (row["billable"], bool(row["corrects_kind"]))
            assert published.appended_at == row["appended_at"]
            assert row == self._world.ledger.first_copies[row["partition"], row["offset"]]
        self._rows_seen = len(inserted)

    def _check_state(self, partition):
        """Counters add up; sums are the log's up to the applied offset; the ledger has every row of them."""
        changed = self._changed[partition]
        if not changed:
            return
        model, meta = self._traffic.models[partition], self.meta(partition)
        applied, counters = meta.applied_offset, meta.counters
        counted = (counters.accepted, counters.duplicates, counters.dead_letters)
        assert model.counted(applied) == counted
        assert applied - counters.first_offset + 1 == sum(counted) + counters.skipped
        stored = self._stored_until[partition]
        lacking = {
            offset
            for offset in model.accepted
            if stored < offset <= applied and (TOPIC_ID, partition, offset) not in self._world.ledger.rows
        }
        assert lacking == set(), "counted, and not in the ledger"
        self._stored_until[partition] = applied
        for key in changed:
            value = self._state[partition].get(key)
            if value is None:
                continue
            if key[2:3] == b"A":
                start, client, sku = parse_aggregate_key(key)
                sums = model.window(start, client, applied).get(sku)
                assert sums == _plain(parse_aggregate_value(value))
            elif key[2:3] == b"T":
                sums, _ = parse_total_value(value)
                assert model.total(parse_total_key(key), applied) == _plain(sums)
        changed.clear()

    def _check_dead_letter(self, partition, letter):
        """Sent once, for the right reason, with the record's own place."""
        offset = letter["offset"]
        assert (letter["topic_id"], letter["partition"]) == (TOPIC_ID, partition)
        assert offset not in self.dead[partition], f"two dead letters of offset {offset}"
        reason = {"unknown_framing": "undecodable", "unknown_schema": "undecodable"}.get(
            letter["reason"], letter["reason"]
        )
        assert self._traffic.models[partition].dead[offset] == reason
        self.dead[partition][offset] = reason

    def _check_snapshot(self, said):
        """True for ever: the window's events up to the cutoff. Never the same cutoff twice."""
        partition, client, cutoff = said["source_partition"], said["client_id"], said["cutoff_offset"]
        key = (partition, said["window_start"], client)
        skus = {sku["sku"]: _counts(sku) for sku in said["skus"]}
        before = self.snapshots.get(key)
        assert before is None or before[0] < cutoff, f"{key}: {before}, then {cutoff}: {skus}"
        assert self._traffic.models[partition].window(said["window_start"], client, cutoff) == skus
        self.snapshots[key] = cutoff, skus

    def _check_total(self, partition, said):
        """True for ever: all the client used up to the cutoff."""
        client, cutoff = said["client_id"], said["cutoff_offset"]
        assert (said["topic_id"], said["source_partition"]) == (TOPIC_ID, partition)
        before = self.totals.get((partition, client))
        assert before is None or before[0] < cutoff
        assert self._traffic.models[partition].total(client, cutoff) == _counts(said)
        self.totals[partition, client] = cutoff, _counts(said)

    def _check_progress(self, partition, said):
        """Behind it no total is missing, and no record of its time; it only grows."""
        model = self._traffic.models[partition]
        until, accounted = said["published_until"], said["accounted_until"]
        told = {client: sums for (p, client), (_, sums) in self.totals.items() if p == partition}
        owed = {client: model.total(client, until) for client in model.by_client}
        assert {client: sums for client, sums in owed.items() if any(sums)} == {
            client: sums for client, sums in told.items() if any(sums)
        }
        later = [p.offset for p in model.published if p.offset > until and p.appended_at <= accounted]
        assert later == [], "accounted, it says, and not counted"
        before = self._progress.get(partition, (-1, -1))
        assert before[0] <= until
        assert before[1] <= accounted
        self._progress[partition] = until, accounted


def _counts(record):
    return (record["count"], record["credits_micro"], record["free_count"], record["free_credits_micro"])


def _plain(sums):
    return (sums.count, sums.credits_micro, sums.free_count, sums.free_credits_micro)
