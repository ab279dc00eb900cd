"""A simulated broker: partition logs, transactions with fencing, and compaction, in memory.

What it does is what Kafka does, as far as tests/contract/test_broker_log.py says. Each method is a request
that the broker has received; who calls it decides whether the answer arrives.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

TRANSACTION_TIMEOUT_S = 15.0
MARKER_DELAYS_S = (0.0, 0.002, 0.03)
"""Between the decision of a transaction and its markers in the partitions, which are not written together."""


class FencedError(Exception):
    """A newer producer of this transactional id was started, or the transaction was given up."""


class Record(NamedTuple):
    """A data record as a consumer gets it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple = ()
    timestamp_type: int = 1


class Fetched(NamedTuple):
    """The answer to a fetch.

    Attributes:
        records: committed ones, in order.
        position: behind all that was looked at, markers and aborted records included.
        stable: the last stable offset.
        end: the offset the next record gets, whoever writes it.
    """

    records: list
    position: int
    stable: int
    end: int


@dataclass(slots=True)
class Entry:
    """One offset: a data record, or (record None) a transaction's marker."""

    offset: int
    record: Record | None
    is_committed: bool


@dataclass(slots=True)
class PartitionLog:
    """Entries by offset; compaction leaves holes."""

    start: int = 0
    end: int = 0
    entries: list = field(default_factory=list)
    open: dict = field(default_factory=dict)
    """Producer id -> entries of its open transaction."""

    @property
    def stable(self):
        return min((entries[0].offset for entries in self.open.values()), default=self.end)

    def append(self, record, producer=None):
        record = record._replace(offset=self.end)
        entry = Entry(self.end, record, producer is None)
        self.entries.append(entry)
        if producer is not None:
            self.open.setdefault(producer, []).append(entry)
        self.end += 1
        return entry.offset

    def mark(self, producer, *, committed):
        """The marker that ends a transaction here."""
        for entry in self.open.pop(producer, ()):
            entry.is_committed = committed
        self.entries.append(Entry(self.end, None, is_committed=False))
        self.end += 1

    def read(self, position, records_max):
        """Committed records from a position on."""
        stable, found = self.stable, []
        at = self._index(position)
        while at < len(self.entries) and (entry := self.entries[at]).offset < stable:
            if entry.is_committed:
                if len(found) == records_max:
                    return Fetched(found, entry.offset, stable, self.end)
                found.append(entry.record)
            at += 1
        return Fetched(found, max(position, stable), stable, self.end)

    def _index(self, position):
        low, high = 0, len(self.entries)
        while low < high:
            middle = (low + high) // 2
            if self.entries[middle].offset < position:
                low = middle + 1
            else:
                high = middle
        return low

    def compact(self, until):
        """Below an offset keep the newest committed value of each key: no aborted record, no tombstone."""
        until = min(until, self.stable)
        newest = {e.record.key: e.offset for e in self.entries if e.is_committed and e.offset < self.stable}
        self.entries = [
            entry
            for entry in self.entries
            if entry.offset >= until
            or (
                entry.is_committed
                and newest[entry.record.key] == entry.offset
                and entry.record.value is not None
            )
        ]


@dataclass(slots=True)
class Transactional:
    """What the coordinator knows of one transactional id."""

    producer: int
    epoch: int = -1
    partitions: set = field(default_factory=set)
    """Of the open transaction."""
    number: int = 0
    """Of the open transaction, or of the next one."""
    unmarked: dict = field(default_factory=dict)
    """Partitions that wait for their marker -> whether it says commit."""


class Broker:
    """All partitions of all topics, and the transaction coordinator.

    Args:
        now_ms: the broker's clock, which stamps records.
        later: called with seconds and a callback.
        random: decides when markers are written.
    """

    def __init__(self, now_ms, later, random):
        self.logs = defaultdict(PartitionLog)
        self.ids = {}
        self.compactions = 0
        self._now_ms = now_ms
        self._later = later
        self._random = random

    # -- records

    def append(self, topic, partition, key, value, headers=()):
        """A producer without transactions. Returns the offset."""
        return self.logs[topic, partition].append(self._record(topic, partition, key, value, headers))

    def _record(self, topic, partition, key, value, headers):
        return Record(topic, partition, -1, self._now_ms(), key, value, tuple(headers))

    def fetch(self, topic, partition, position, records_max=1_000):
        """What read_committed gives from a position on."""
        return self.logs[topic, partition].read(position, records_max)

    def state(self, topic, partition):
        """The newest committed value of each key."""
        state = {}
        log = self.logs[topic, partition]
        for record in log.read(log.start, 10**9).records:
            if record.value is None:
                state.pop(record.key, None)
            else:
                state[record.key] = record.value
        return state

    def compact(self, topic, partition, until):
        """The cleaner comes by; what is open, or behind `until` (the active segment), it leaves alone."""
        self.logs[topic, partition].compact(until)
        self.compactions += 1

    # -- transactions

    def start_producer(self, transactional_id):
        """InitProducerId: finish or abort what is open, refuse everybody before. Returns the epoch."""
        known = self.ids.get(transactional_id)
        if known is None:
            known = self.ids[transactional_id] = Transactional(len(self.ids))
        self._write_markers(known)
        known.epoch += 1
        self._decide(known, committed=False)
        self._write_markers(known)
        return known.epoch

    def produce(self, transactional_id, epoch, topic, partition, records):
        """AddPartitionsToTxn and Produce: records become part of the open transaction."""
        known = self._owned(transactional_id, epoch)
        self._write_markers(known)  # until then a client is told to come again
        if not known.partitions:
            number = known.number
            self._later(TRANSACTION_TIMEOUT_S, lambda: self._give_up(known, number))
        known.partitions.add((topic, partition))
        log = self.logs[topic, partition]
        for key, value, headers in records:
            log.append(self._record(topic, partition, key, value, headers), known.producer)

    def end_transaction(self, transactional_id, epoch, *, committed):
        """EndTxn: decided when this returns; the markers follow."""
        self._decide(self._owned(transactional_id, epoch), committed=committed)

    def _owned(self, transactional_id, epoch):
        known = self.ids[transactional_id]
        if epoch != known.epoch:
            raise FencedError(transactional_id)
        return known

    def _decide(self, known, *, committed):
        for place in sorted(known.partitions):
            known.unmarked[place] = committed
            self._later(self._random.choice(MARKER_DELAYS_S), lambda place=place: self._mark(known, place))
        known.partitions = set()
        known.number += 1

    def _write_markers(self, known):
        for place in list(known.unmarked):
            self._mark(known, place)

    def _mark(self, known, place):
        if place in known.unmarked:
            self.logs[place].mark(known.producer, committed=known.unmarked.pop(place))

    def _give_up(self, known, number):
        """The coordinator's own end of a transaction that takes too long."""
        if known.number == number:
            known.epoch += 1
            self._decide(known, committed=False)
