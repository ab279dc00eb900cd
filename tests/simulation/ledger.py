"""A simulated ledger: the rows of `events`, and the sums that metering asks for.

Inserting is idempotent by (topic id, partition, offset): the newest copy stands, as after any merge.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import astuple

from tests.ledger_rows import dedupe_columns

from meterline.domain.windows import SkuTotal
from meterline.ledger.queries import DedupePage

RETRY_S = 0.4


class AwayError(Exception):
    """No answer; part of the rows may be there."""


class Ledger:
    """The table.

    Attributes:
        rows: as the views show them.
        inserted: every copy of every row ever inserted, in order.
        first_copies: (partition, offset) -> the row as it was inserted first.
    """

    def __init__(self):
        self.rows, self.inserted, self.first_copies = {}, [], {}
        self.is_away = False
        self.partial = []
        """What the next inserts do before they fail: the share of their rows that is stored."""

    def insert(self, columns, data):
        """Store rows, or some of them and fail."""
        if self.is_away:
            raise AwayError
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*data, strict=True)]
        stored = rows[: round(len(rows) * self.partial[0])] if self.partial else rows
        for row in stored:
            place = row["topic_id"], row["partition"], row["offset"]
            self.inserted.append(row)
            self.first_copies.setdefault(place[1:], row)
            self.rows[place] = row
        if self.partial:
            self.partial.pop(0)
            raise AwayError

    def ask(self, question, arguments):
        """What a function of `ledger.queries` answers."""
        if self.is_away:
            raise AwayError
        return getattr(self, question)(*arguments)

    # -- the questions, under the names and with the arguments of `ledger.queries`

    def _ping(self):
        """It answers."""

    def partition_offsets(self, topic_id, partition):
        offsets = [row["offset"] for row in self._of(topic_id, partition, 2**63)]
        return (len(offsets), min(offsets), max(offsets)) if offsets else None

    def last_offset(self, topic_id, partition):
        return max((row["offset"] for row in self._of(topic_id, partition, 2**63)), default=None)

    def dedupe_pages(self, topic_id, partition, applied_offset, appended_since_ms, offsets_per_page):
        pages = defaultdict(list)
        for row in self._of(topic_id, partition, applied_offset):
            if row["appended_at"] >= appended_since_ms:
                pages[row["offset"] // offsets_per_page].append((row["offset"], row["appended_at"]))
        columns = (zip(*rows, strict=True) for _, rows in sorted(pages.items()))
        return [DedupePage(min(offsets), max(offsets), min(times), max(times)) for offsets, times in columns]

    def dedupe_rows(self, topic_id, partition, page):
        return dedupe_columns(
            row
            for row in self._of(topic_id, partition, page.last_offset)
            if row["offset"] >= page.first_offset and page.since_ms <= row["appended_at"] <= page.until_ms
        )

    def kept_windows(self, topic_id, partition, applied_offset, occurred_since_ms, lengths):
        sums = defaultdict(SkuTotal)
        for row in self._of(topic_id, partition, applied_offset):
            if row["occurred_at"] >= occurred_since_ms:
                _add(sums[lengths.start_of(row["occurred_at"]), row["client_id"], row["sku"]], row)
        return [(*key, *astuple(total)) for key, total in sums.items()]

    def window_sums(self, windows):
        return [self._window_sums(ref, cutoff) for ref, cutoff in windows]

    def _window_sums(self, ref, cutoff):
        sums = defaultdict(SkuTotal)
        for row in self._of(ref.topic_id, ref.partition, cutoff):
            if row["client_id"] == ref.client_id and ref.start <= row["occurred_at"] < ref.end:
                _add(sums[row["sku"]], row)
        return dict(sums)

    def _of(self, topic_id, partition, until):
        return [
            row
            for (topic, number, offset), row in self.rows.items()
            if topic == topic_id and number == partition and offset <= until
        ]


def _add(sums, row):
    if row["billable"]:
        sums.count += 1
        sums.credits_micro += row["credits_micro"]
    else:
        sums.free_count += 1
        sums.free_credits_micro += row["credits_micro"]


class LedgerOfProcess:
    """What a worker sees of it: a LedgerWriter and a LedgerReader that try until they are answered."""

    def __init__(self, world, process):
        self._ledger = world.ledger
        self._inserts = world.connect(process)
        self._questions = world.connect(process)

    async def insert(self, table, columns, data, block=None):
        assert table == "events"
        assert block is None, "the plain meter makes none"
        # As the driver sends it: whatever the worker does with its lists meanwhile.
        sent = [list(column) for column in data]
        while True:
            try:
                return await self._inserts.call(lambda: self._ledger.insert(columns, sent))
            except AwayError:
                await asyncio.sleep(RETRY_S)

    async def ask(self, question, *arguments):
        while True:
            try:
                return await self._questions.call(lambda: self._ledger.ask(question.__name__, arguments))
            except AwayError:
                await asyncio.sleep(RETRY_S)

    async def wait_until_up(self):
        await self.ask(Ledger._ping)
