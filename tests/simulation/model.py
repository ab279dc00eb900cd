"""What must come of the input, said once more and naively: no index, no state, no chunk, no crash.

Shares no code with what it judges: what was published is remembered as plain values.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

FIVE_MINUTES_MS = 300_000


class Usage(NamedTuple):
    """An event as its producer meant it."""

    event_id: str
    client: str
    sku: str
    credits_micro: int
    occurred_at: int
    billable: bool = True
    is_correction: bool = False

    @property
    def payload(self):
        """What a second copy must agree in."""
        return (self.sku, self.credits_micro, self.billable, self.is_correction)


class Published(NamedTuple):
    """A record in the log: its place, its time, and what is in it (None: bytes that say nothing)."""

    offset: int
    appended_at: int
    usage: Usage | None


class PartitionModel:
    """The fates of one partition's records, each judged by those before it."""

    def __init__(self, length_ms, horizon_ms):
        self.lengths, self._horizon_ms = [(0, length_ms)], horizon_ms
        """From which event time on windows are how long, oldest first."""
        self.published = []
        self.also_refused = lambda _published: None
        """The reason of a rule that a newer version brings, if it refuses this."""
        self.accepted, self.dead = {}, {}
        self.duplicates = set()
        self.by_window, self.by_client = defaultdict(list), defaultdict(list)
        self._copies = {}
        self._newest = 0

    def _window_of(self, usage):
        _, length_ms = max(length for length in self.lengths if length[0] <= usage.occurred_at)
        return usage.occurred_at - usage.occurred_at % length_ms, usage.client

    def lengthen(self, lengths, applied):
        """Windows have other lengths, but none that holds an event up to the applied offset."""
        for (_, before), (starts, after) in pairwise(lengths):
            assert starts % before == starts % after == 0, "windows overlap"
        held = {o: self._window_of(p.usage) for o, p in self.accepted.items() if o <= applied}
        self.lengths = lengths
        assert held == {offset: self._window_of(self.accepted[offset].usage) for offset in held}
        self.by_window.clear()
        for published in self.accepted.values():
            self.by_window[self._window_of(published.usage)].append(published)

    def judge(self, published):
        """The next record, in the order of offsets."""
        self.published.append(published)
        self._newest = max(self._newest, published.appended_at)
        fate = self._fate(published)
        if fate == "accepted":
            usage = published.usage
            self.accepted[published.offset] = published
            self._copies[usage.client, usage.event_id] = published
            self.by_window[self._window_of(usage)].append(published)
            self.by_client[usage.client].append(published)
        elif fate == "duplicate":
            self.duplicates.add(published.offset)
        else:
            self.dead[published.offset] = fate

    def _fate(self, published):
        usage = published.usage
        if usage is None:
            return "undecodable"
        if usage.credits_micro < 0 and not usage.is_correction:
            return "negative_credits"
        if usage.occurred_at > published.appended_at + FIVE_MINUTES_MS:
            return "time_in_future"
        if reason := self.also_refused(published):
            return reason
        copy = self._copies.get((usage.client, usage.event_id))
        if copy is None or self._newest - copy.appended_at > self._horizon_ms:
            return "accepted"
        return "duplicate" if copy.usage.payload == usage.payload else "conflict"

    def window(self, start, client, until):
        """SKU -> (count, credits, free count, free credits) of a window's events up to an offset."""
        skus = {}
        for published in self.by_window.get((start, client), ()):
            if published.offset <= until:
                usage = published.usage
                skus[usage.sku] = _plus(skus.get(usage.sku, (0, 0, 0, 0)), usage)
        return skus

    def total(self, client, until):
        """(count, credits, free count, free credits) of all that a client used up to an offset."""
        sums = (0, 0, 0, 0)
        for published in self.by_client.get(client, ()):
            if published.offset <= until:
                sums = _plus(sums, published.usage)
        return sums

    def counted(self, until):
        """How many records up to an offset are (accepted, duplicates, dead letters)."""
        return tuple(
            sum(offset <= until for offset in offsets)
            for offsets in (self.accepted, self.duplicates, self.dead)
        )


def _plus(sums, usage):
    if usage.billable:
        return (sums[0] + 1, sums[1] + usage.credits_micro, *sums[2:])
    return (*sums[:2], sums[2] + 1, sums[3] + usage.credits_micro)
