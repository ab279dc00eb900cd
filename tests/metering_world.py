"""A metering partition without servers: its log, what is durable of it, and what its clients owe.

The owner is the real one; the ledger, the changelog and the topics are a few dictionaries.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import NamedTuple

from tests.simulation.ledger import Ledger
from tests.simulation.worker import CODECS, metering_tools

from meterline.contracts.records import event_to_record
from meterline.domain.events import UsageEvent
from meterline.errors import PartitionHalted
from meterline.metering.owner import MeteringOwner
from meterline.metering.state import Meta, meta_key
from meterline.metering.worker import make_meter
from meterline.settings import MeteringSettings
from meterline.streaming.owner import LogRange

LENGTH, START = 1_000, 1_700_000_000_000
OPTIONS = MeteringSettings(
    window_length_ms=LENGTH,
    allowed_lateness_ms=0,
    keep_closed_windows_ms=2_000,
    late_snapshot_interval_ms=500,
)
TOTAL_KEY = b"17:meterline.total.1,"


class Record(NamedTuple):
    offset: int
    timestamp: int
    value: bytes
    key: bytes = b""
    headers: tuple = ()
    topic: str = "usage.events"
    partition: int = 0
    timestamp_type: int = 1


class Crash(BaseException):
    """The worker is killed at a write."""


class World(Ledger):
    """One partition: its log, what is durable, and what the clients owe. Its ledger is the simulation's."""

    def __init__(self):
        super().__init__()
        self.now = START
        self.topic_id, self.log, self.log_start, self.accepted = "topic", [], 0, {}
        self.fates = Counter()
        self.changelog = {}
        self.windows, self.totals, self.too_early = {}, {}, []
        self.dead_letters = []
        self.writes, self.dies_at, self.halted = 0, None, ""
        self.options = OPTIONS
        self.wall_at_rest = START + 10**6

    # -- the log

    def append(self, client, credits_micro, event_id=None, *, ago=0, sku="gpu", fate="accepted"):
        """A record, and what must become of it."""
        offset = len(self.log)
        occurred_at = START + 300 * offset - ago
        self.append_event(
            UsageEvent(event_id or f"e{offset}", client, "task", sku, credits_micro, occurred_at)
        )
        self.fates[fate] += 1
        if fate == "accepted":
            self.accepted[offset] = (client, credits_micro)

    def append_event(self, event):
        """A record of which nothing is expected."""
        offset = len(self.log)
        value = CODECS["usage-event"].encode(event_to_record(event))
        self.log.append(Record(offset, START + 300 * offset, value))

    def append_poison(self, client):
        """No event: only its key tells whose it is."""
        offset = len(self.log)
        self.log.append(Record(offset, START + 300 * offset, b"poison", client.encode()))
        self.fates["dead_letters"] += 1

    def append_some(self):
        for number in range(6):
            self.append("acme", 1_000 + number)
            self.append("other", 10 + number, ago=400)
        self.append("acme", 1_002, "e4", fate="duplicates")
        self.append("acme", 9_999, "e4", fate="dead_letters")
        self.append("acme", 7, ago=2_500)
        self.append("other", 3, ago=3_900)
        self.append("acme", 1_000, "e0", ago=5_000, fate="duplicates")
        self.append("acme", 11, ago=1_300)  # its window is published a moment ago, and kept
        self.append("other", 13, ago=1_300)
        self.append("other", 5)

    def owed(self, until=2**63):
        """What each client has used up to an offset: the log alone says it."""
        owed = Counter()
        for offset, (client, credits_micro) in self.accepted.items():
            if offset <= until:
                owed[client] += credits_micro
        return dict(owed)

    # -- what is durable

    def write(self):
        """Before and after each write: the places to die."""
        self.writes += 1
        if self.writes == self.dies_at:
            raise Crash

    async def insert(self, _, columns, data, block):
        assert block is None, "the plain meter makes none"
        self.write()
        super().insert(columns, data)
        self.write()

    async def commit(self, what):
        self.write()
        for key, value in what.changelog:
            if value is None:
                self.changelog.pop(key, None)
            else:
                self.changelog[key] = value
        for output in what.outputs:
            self._publish(output)
        self.write()

    def _publish(self, output):
        if output.topic == "usage.windows":
            said = CODECS["usage-window"].decode(output.value)
            window = said["client_id"], said["window_start"]
            credits_micro = sum(sku["credits_micro"] for sku in said["skus"])
            self.windows[window] = max(
                self.windows.get(window, (-1, 0)), (said["cutoff_offset"], credits_micro)
            )
        elif output.topic == "usage.totals" and output.key.startswith(TOTAL_KEY):
            said = CODECS["usage-total"].decode(output.value)
            self.totals[said["client_id"]] = said["credits_micro"]
        elif output.topic == "usage.events.dlq":
            self.dead_letters.append(CODECS["dead-letter"].decode(output.value)["offset"])
        elif output.topic == "usage.totals":
            until = CODECS["usage-progress"].decode(output.value)["published_until"]
            if self.totals != self.owed(until):
                self.too_early.append((until, dict(self.totals), self.owed(until)))

    # -- the ledger, asked

    async def ask(self, question, *args):
        return getattr(self, question.__name__)(*args)

    # -- the worker

    def tools(self):
        return metering_tools(
            self,
            settings=self.options,
            window_partitions=1,
            make_meter=make_meter,
            now_ms=lambda: self.now,
        )

    def range(self):
        return LogRange("cluster", "usage.events", self.topic_id, 0, self.log_start, len(self.log))

    async def _work(self, slice_length, rests):
        owner = MeteringOwner(0, self.tools())
        position = await owner.restore(dict(self.changelog), self.range(), self.commit)
        while records := self.log[position : position + slice_length]:
            owner.feed(records)
            position += len(records)
            self.now += 400
            await owner.flush()
        if not rests:
            return
        owner.on_caught_up(START + 10**6)
        owner.on_idle(self.wall_at_rest)
        for _ in range(3):
            self.now += 5_000
            await owner.flush()

    def work(self, slice_length=3, *, rests=True):
        """One worker's life, to the end of the log or to its death. Without a rest it is killed right after
        the commit of the last record, before wall time closes windows.
        """
        self.halted = ""
        try:
            asyncio.run(self._work(slice_length, rests))
        except Crash:
            pass
        except PartitionHalted as stop:
            self.halted = str(stop)

    def books(self):
        """Credits by client: as the ledger's rows, the newest snapshots and the newest totals say."""
        rows, windows = Counter(), Counter()
        for row in self.rows.values():
            rows[row["client_id"]] += row["credits_micro"]
        for (client, _), (_, credits_micro) in self.windows.items():
            windows[client] += credits_micro
        return [dict(rows), dict(windows), self.totals]

    def counted(self):
        """What became of the offsets, as the committed counters say."""
        counters = Meta.from_bytes(self.changelog[meta_key(0)]).counters
        return {name: getattr(counters, name) for name in ("accepted", "duplicates", "dead_letters")}
