"""The meter of one partition: pure logic from records to windows, ledger rows and dead letters.

Records go in, in offset order (`take`); a flush comes out (`build_flush`). No IO and no clock: times are
arguments, so the same log gives the same totals whatever the chunking, the crashes or the worker.

A window that was evicted may come back with a late event. Its limits are judged with its past, which stands
in the ledger: the record waits, and all that come after it, until `add_past` has brought what
`windows_lacking_past` names. Judged without, the sum of both could pass a limit, too late to refuse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from meterline.domain.brake import Brake
from meterline.domain.dedupe import SeenIds
from meterline.domain.events import UsageEvent, check_event, identity_hash, payload_digest
from meterline.domain.reasons import Reason
from meterline.domain.totals import UsageProgress, UsageTotal
from meterline.domain.windows import (
    SKUS_PER_WINDOW_MAX,
    SkuTotal,
    WindowRef,
    WindowSnapshot,
)
from meterline.errors import DeadLetterError
from meterline.ledger.blocks import EncodedBlock
from meterline.metering.state import (
    Counters,
    Meta,
    aggregate_key,
    aggregate_prefix,
    aggregate_value,
    brake_key,
    meta_key,
    parse_aggregate_key,
    parse_aggregate_value,
    parse_published_value,
    parse_total_key,
    parse_total_value,
    parse_window_key,
    published_value,
    total_key,
    total_value,
    window_key,
)
from meterline.settings import MeteringSettings

__all__ = ["DeadLetter", "Flush", "Meter", "WindowKey"]

INT64_MAX = 2**63 - 1

TOTALS_INTERVAL_MS = 1_000
"""How often totals are published, and the progress behind them: a credit bucket needs no finer clock, and a
client with 10,000 events a second costs one record, not 10,000."""

EVENT_FIELDS = 10
"""Fields of an event that are columns as they are; the eleventh is the correction."""

WindowKey = tuple[int, str]
"""Window start (ms) and client."""

NOBODY = 0
"""In place of the identity where there is no event."""

_NO_CORRECTION = ("", "", "", 0, 0)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that can never be accepted, and why."""

    record: Any
    reason: str
    detail: str
    client: bytes
    """Whose it is, as far as anybody can tell: the event's client, or the record's key."""


Read = tuple[Any, UsageEvent | DeadLetter]
"""A record, and what it is by itself."""


@dataclass(slots=True)
class OpenWindow:
    """One client's window as far as it is in memory."""

    skus: dict[str, SkuTotal] = field(default_factory=dict)
    published_cutoff: int = -1
    last_offset: int = -1
    published_at: int = 0
    """When the newest snapshot was built (ms); bounds how often late events make a new one."""
    reopened: bool = False
    """It was evicted, and came back with its past."""


@dataclass(slots=True)
class ClientTotal:
    """All that one client has ever used from this partition, over all SKUs."""

    sums: SkuTotal = field(default_factory=SkuTotal)
    last_offset: int = -1


@dataclass(frozen=True, slots=True)
class Flush:
    """What one flush writes, decided and not to be changed."""

    rows: list[list[Any]]
    """Columns of the ledger's `events`, in the order of `ledger.tables.EVENT_COLUMNS`."""
    changelog: list[tuple[bytes, bytes | None]]
    snapshots: list[WindowSnapshot]
    totals: list[UsageTotal]
    progress: UsageProgress | None
    """After the totals; None when it isn't time for them."""
    dead_letters: list[DeadLetter]
    meta: Meta
    duplicates: int
    late: int
    """Accepted events whose window was closed."""
    late_reopened: int
    """Those among them whose window came back from the ledger."""
    block: EncodedBlock | None = None
    """More rows, encoded as they were read."""

    @property
    def accepted(self) -> int:
        """How many rows there are."""
        return (len(self.rows[0]) if self.rows else 0) + (self.block.rows if self.block is not None else 0)


class Meter:
    """Folds one partition.

    Args:
        decode: bytes of a record to a UsageEvent, or DeadLetterError.
        meta: where the partition stands.
    """

    def __init__(
        self,
        partition: int,
        settings: MeteringSettings,
        decode: Callable[[bytes | None], UsageEvent],
        meta: Meta,
        seen: SeenIds,
    ) -> None:
        self.partition = partition
        self.meta = meta
        self.seen = seen
        self.windows: dict[WindowKey, OpenWindow] = {}
        self.next_offset = meta.applied_offset + 1
        """Of the first record not handed over yet; those that wait are in front of it."""
        self.watermark = meta.watermark
        self.brake = Brake(settings.brake_dead_letters_max, settings.brake_clients_min)
        self._settings = settings
        self._decode = decode
        self._lengths = meta.lengths
        self._appended_at = meta.appended_at
        self._undecided = self.next_offset
        self._waiting: list[Callable[[], None]] = []
        self._lacking: dict[WindowKey, None] = {}
        self._pasts: dict[WindowKey, dict[str, SkuTotal]] = {}
        self._totals: dict[str, ClientTotal] = {}
        self._unpublished_totals: set[str] = set()
        self._totals_published_at = 0
        self._caught_up_until = 0
        self._clients_by_start: defaultdict[int, set[str]] = defaultdict(set)
        self._unpublished: dict[int, set[str]] = {}
        self._changed: dict[WindowKey, set[str]] = {}
        self._changed_totals: set[str] = set()
        self._start_collecting()

    def _start_collecting(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._dead: list[DeadLetter] = []
        self._duplicates = self._skipped = self._late = self._late_reopened = 0

    # -- restore

    def restore(self, state: Mapping[bytes, bytes]) -> None:
        """Bring back the windows and the totals from the committed state."""
        windows: defaultdict[WindowKey, OpenWindow] = defaultdict(OpenWindow)
        for key, value in state.items():
            kind = key[2:3]
            if kind == b"A":
                start, client, sku = parse_aggregate_key(key)
                windows[start, client].skus[sku] = parse_aggregate_value(value)
            elif kind == b"W":
                window = windows[parse_window_key(key)]
                window.published_cutoff, window.last_offset = parse_published_value(value)
            elif kind == b"T":
                client = parse_total_key(key)
                total = self._totals[client] = ClientTotal(*parse_total_value(value))
                if total.last_offset > self.meta.published_until:
                    self._unpublished_totals.add(client)
            elif kind == b"B":
                self.brake.restore(value)
        self.windows.update(windows)
        for (start, client), window in windows.items():
            self._clients_by_start[start].add(client)
            if window.published_cutoff < 0:
                window.last_offset = self.meta.applied_offset
            if window.last_offset > window.published_cutoff:
                self._unpublished.setdefault(start, set()).add(client)

    def adopt_totals(self, sums: Mapping[str, SkuTotal]) -> None:
        """Take over from the ledger what an older state format did not hold: all published anew."""
        for client, of_client in sums.items():
            self._totals[client] = ClientTotal(of_client, self.meta.applied_offset)
        self._changed_totals.update(sums)
        self._unpublished_totals.update(sums)

    def kept_windows(self) -> dict[WindowKey, dict[str, SkuTotal]]:
        """What memory says every kept window adds up to, by SKU; the ledger must say the same."""
        return {key: window.skus for key, window in self.windows.items()}

    def _window(self, start: int, client: str) -> OpenWindow:
        window = self.windows.get((start, client))
        if window is None:
            window = self.windows[start, client] = OpenWindow()
            self._clients_by_start[start].add(client)
        return window

    # -- take in

    @property
    def pending(self) -> int:
        """Records taken in and not yet part of a committed flush."""
        return self.next_offset - 1 - self.meta.applied_offset

    def take(self, records: Iterable[Any]) -> None:
        """Decide the fate of each record: ledger, duplicate or dead letter.

        From the first that may lack its window's past on they wait, all records of this call and of the next
        ones, until `add_past` has brought it.
        """
        reads = [self._read(record) for record in records]
        if not reads:
            return
        self.next_offset = reads[-1][0].offset + 1
        windows = (
            (self._lengths.start_of(event.occurred_at), event.client_id)
            for _, event in reads
            if isinstance(event, UsageEvent) and event.occurred_at < self.watermark  # or nothing has ended
        )
        if self._knows(window for window in windows if self._has_ended(window[0])):
            self._decide(reads)
        else:
            self._waiting.append(partial(self._decide, reads))

    def _read(self, record: Any) -> Read:
        """What a record is when no other one is looked at."""
        client = record.key or b""
        try:
            event = self._decode(record.value)
            client = event.client_id.encode()
            check_event(event, record.timestamp)
        except DeadLetterError as refusal:
            return record, DeadLetter(record, refusal.reason, refusal.detail, client)
        return record, event

    def end_of(self, start: int) -> int:
        """End (ms) of the window that begins there."""
        return self._lengths.end_of(start)

    def _has_ended(self, start: int) -> bool:
        """Whether a window may have been evicted before the records that are handed over now.

        That happens in flushes, and the watermark has not gone back since. Not asked of the time for which
        windows are kept: that setting may have been smaller.
        """
        return self.end_of(start) <= self.watermark

    def _knows(self, ended: Iterable[WindowKey]) -> bool:
        """Whether records with these ended windows can be decided now. What lacks its past is noted."""
        self._lacking.update(
            dict.fromkeys(key for key in ended if key not in self.windows and key not in self._pasts)
        )
        return not self._lacking and not self._waiting

    def _decide(self, reads: Sequence[Read]) -> None:
        identities = [
            identity_hash(event.client_id, event.event_id) if isinstance(event, UsageEvent) else NOBODY
            for _, event in reads
        ]
        may_be_older = self.seen.may_be_older(identities)
        for (record, event), identity, is_older in zip(reads, identities, may_be_older, strict=True):
            self._skipped += record.offset - self._undecided
            self._undecided = record.offset + 1
            self._appended_at = max(self._appended_at, record.timestamp)
            if isinstance(event, DeadLetter):
                self._refuse(event)
                continue
            try:
                self._take_event(event, identity, record, may_be_older=is_older)
            except DeadLetterError as refusal:
                client = event.client_id.encode()
                self._refuse(DeadLetter(record, refusal.reason, refusal.detail, client))

    def _refuse(self, dead: DeadLetter) -> None:
        self._dead.append(dead)
        self.brake.count(dead.record.offset, dead.client, dead.reason)

    def _take_event(self, event: UsageEvent, identity: int, record: Any, *, may_be_older: bool) -> None:
        digest = payload_digest(event)
        # Judged at the newest append time so far: the broker's clock may step back, and a rebuilt index
        # holds only what is within the horizon of that time.
        first = self.seen.find(identity, self._appended_at, may_be_older=may_be_older)
        if first is not None:
            if first != digest:
                raise DeadLetterError(
                    Reason.CONFLICT, f"event {event.event_id} was accepted before with another payload"
                )
            self._duplicates += 1
            return
        self._fold(event, record.offset)
        self.seen.add(identity, digest, record.timestamp)
        self._rows.append(
            (
                self.meta.topic_id,
                self.partition,
                record.offset,
                record.timestamp,
                *event[:EVENT_FIELDS],
                *(event.corrects or _NO_CORRECTION),
                identity,
                digest,
            )
        )
        self.watermark = max(self.watermark, event.occurred_at - self._settings.allowed_lateness_ms)

    def _fold(self, event: UsageEvent, offset: int) -> None:
        """Add to the window, or refuse before anything is changed."""
        start = self._lengths.start_of(event.occurred_at)
        key = (start, event.client_id)
        window = self.windows.get(key)
        skus = window.skus if window is not None else self._pasts.get(key, {})
        total = skus.get(event.sku)
        if total is None:
            if len(skus) >= SKUS_PER_WINDOW_MAX:
                raise DeadLetterError(
                    Reason.TOO_MANY_SKUS,
                    f"the window already holds {SKUS_PER_WINDOW_MAX} SKUs of this client",
                )
            total = SkuTotal()
        _require_in_range(total, event, Reason.WINDOW_TOTAL_OUT_OF_RANGE, event.sku)
        lifetime = self._totals.get(event.client_id) or ClientTotal()
        _require_in_range(lifetime.sums, event, Reason.LIFETIME_TOTAL_OUT_OF_RANGE, "the client's usage")
        window = self._open(start, event.client_id)
        _add(total, event)
        window.skus[event.sku] = total
        _add(lifetime.sums, event)
        lifetime.last_offset = offset
        self._totals[event.client_id] = lifetime
        self._changed_totals.add(event.client_id)
        window.last_offset = offset
        is_late = event.occurred_at < self.watermark and self._is_closed(start)
        self._count_late(window, int(is_late))
        self._changed[key].add(event.sku)

    def _open(self, start: int, client: str) -> OpenWindow:
        """The window of an accepted event, with its past where it has one: all that will be written."""
        key = start, client
        window = self.windows.get(key)
        if window is None:
            window = self._window(start, client)
            window.skus = self._pasts.pop(key, window.skus)
            window.reopened = bool(window.skus)
            self._changed[key] = set(window.skus)
        elif key not in self._changed:
            self._changed[key] = set()
        if window.last_offset <= window.published_cutoff:
            self._unpublished.setdefault(start, set()).add(client)
        return window

    def _count_late(self, window: OpenWindow, events: int) -> None:
        self._late += events
        if window.reopened:
            self._late_reopened += events

    def _is_closed(self, start: int) -> bool:
        return self.end_of(start) + self._settings.grace_ms <= self.watermark

    def _is_evictable(self, start: int) -> bool:
        return self.end_of(start) <= self.watermark - self._settings.keep_closed_windows_ms

    def advance_watermark(self, to: int) -> None:
        """Wall time counts as event time on an idle partition: snapshots are true whatever the moment."""
        self.watermark = max(self.watermark, to)

    def caught_up(self, log_time_ms: int) -> None:
        """Everything the broker appended at or before this time has been taken in."""
        if not self._waiting:  # what waits is not accounted; the log's clock is told again
            self._caught_up_until = max(self._caught_up_until, log_time_ms)

    # -- flush

    @property
    def open_windows(self) -> int:
        """Windows of clients that are still taking events in time."""
        return sum(len(clients) for start, clients in self._unpublished.items() if not self._is_closed(start))

    @property
    def oldest_unpublished(self) -> int | None:
        """Start (ms) of the oldest window that holds what no snapshot says yet."""
        return min(self._unpublished, default=None)

    def windows_lacking_past(self) -> list[WindowRef]:
        """Windows the waiting records need: before a flush each wants its `add_past`."""
        return [self._ref(start, client) for start, client in self._lacking]

    def add_past(self, ref: WindowRef, past: Mapping[str, SkuTotal]) -> None:
        """Tell what the ledger holds of a window up to the applied offset.

        With the last one that is lacking, the records that wait are decided.
        """
        key = ref.start, ref.client_id
        self._lacking.pop(key)
        self._pasts[key] = {sku: total.copy() for sku, total in past.items()}
        if not self._lacking:
            waiting, self._waiting = self._waiting, []
            for decide in waiting:
                decide()
            self._pasts = {}

    def due_windows(self, now_ms: int) -> list[WindowKey]:
        """Closed windows that hold more than their newest snapshot says, late ones at a bounded cadence."""
        due = []
        for start in sorted(self._unpublished):
            if not self._is_closed(start):
                break
            for client in self._unpublished[start]:
                window = self.windows[start, client]
                if window.published_cutoff < 0 or not self._is_fresh(start, client, now_ms):
                    due.append((start, client))
        return due

    def _is_fresh(self, start: int, client: str, now_ms: int) -> bool:
        """Too new a snapshot for another one, late events or not."""
        return now_ms - self.windows[start, client].published_at < self._settings.late_snapshot_interval_ms

    def build_flush(self, now_ms: int) -> Flush | None:
        """Decide what to write; None when there is nothing.

        Args:
            now_ms: becomes `closed_at` of the snapshots and bounds the cadence of late ones and of totals;
                nothing else.
        """
        assert not self._waiting, "a flush would pass by the records that wait for a window's past"
        due = self.due_windows(now_ms)
        totals_due = self._are_totals_due(now_ms)
        if not self.pending and not due and not totals_due:
            return None
        cutoff = self.next_offset - 1
        changelog: list[tuple[bytes, bytes | None]] = []
        for (start, client), skus in self._changed.items():
            window = self.windows[start, client]
            prefix, sums = aggregate_prefix(self.partition, start, client), window.skus
            changelog += [(prefix + sku.encode(), aggregate_value(sums[sku])) for sku in skus]
            if window.published_cutoff >= 0:
                changelog.append(self._window_record(start, client, window))
        snapshots = [self._publish(start, client, cutoff, now_ms) for start, client in due]
        changelog += [self._window_record(*key, self.windows[key]) for key in due]
        changelog += self._evict(now_ms)
        self._unpublished_totals |= self._changed_totals
        for client in self._changed_totals:
            total = self._totals[client]
            changelog.append((total_key(self.partition, client), total_value(total.sums, total.last_offset)))
        if self._dead:
            changelog.append((brake_key(self.partition), self.brake.to_bytes()))
        totals, progress = self._publish_totals(cutoff, now_ms) if totals_due else ([], None)
        flush = Flush(
            rows=[list(column) for column in zip(*self._rows, strict=True)],
            changelog=changelog,
            snapshots=snapshots,
            totals=totals,
            progress=progress,
            dead_letters=self._dead,
            meta=self._next_meta(cutoff, progress),
            duplicates=self._duplicates,
            late=self._late,
            late_reopened=self._late_reopened,
        )
        changelog.append((meta_key(self.partition), flush.meta.to_bytes()))
        self._changed = {}
        self._changed_totals = set()
        self._start_collecting()
        return flush

    def committed(self, flush: Flush) -> None:
        """The broker has the flush.

        Raises:
            PartitionHalted: the dedupe index has no room to go on; the flush stands.
        """
        self.meta = flush.meta
        self.seen.close_slice(self._appended_at)

    def _accounted_until(self) -> int:
        """Log time up to which nothing can be missing: more records may share the newest append time."""
        return max(self.meta.accounted_until, self._caught_up_until, self._appended_at - 1)

    def _are_totals_due(self, now_ms: int) -> bool:
        if now_ms - self._totals_published_at < TOTALS_INTERVAL_MS:
            return False
        meta = self.meta
        return self._accounted_until() > meta.accounted_until or self.next_offset - 1 > meta.published_until

    def _publish_totals(self, cutoff: int, now_ms: int) -> tuple[list[UsageTotal], UsageProgress]:
        """Every total that changed, then the progress: behind it no total is missing."""
        topic_id = self.meta.topic_id
        totals = [
            UsageTotal(topic_id, self.partition, client, cutoff, self._totals[client].sums.copy())
            for client in sorted(self._unpublished_totals)
        ]
        self._unpublished_totals = set()
        self._totals_published_at = now_ms
        return totals, UsageProgress(topic_id, self.partition, self._accounted_until(), cutoff)

    def _publish(self, start: int, client: str, cutoff: int, now_ms: int) -> WindowSnapshot:
        window = self.windows[start, client]
        window.published_cutoff, window.published_at = cutoff, now_ms
        clients = self._unpublished[start]
        clients.discard(client)
        if not clients:
            del self._unpublished[start]
        skus = {sku: total.copy() for sku, total in window.skus.items()}
        return WindowSnapshot(self._ref(start, client), cutoff, skus, now_ms, self.watermark)

    def _ref(self, start: int, client: str) -> WindowRef:
        return WindowRef(client, start, self.end_of(start), self.meta.topic_id, self.partition)

    def _window_record(self, start: int, client: str, window: OpenWindow) -> tuple[bytes, bytes]:
        key = window_key(self.partition, start, client)
        return key, published_value(window.published_cutoff, window.last_offset)

    def _evict(self, now_ms: int) -> list[tuple[bytes, None]]:
        """Forget closed windows that are published and older than what memory keeps.

        Not one that was published a moment ago: forgotten, it would come back with the next late event and be
        published at once, at no bounded cadence.
        """
        forgotten: list[tuple[bytes, None]] = []
        for start in [s for s in self._clients_by_start if self._is_evictable(s)]:
            kept = self._unpublished.get(start, set()) | {
                client for client in self._clients_by_start[start] if self._is_fresh(start, client, now_ms)
            }
            for client in self._clients_by_start[start] - kept:
                window = self.windows.pop((start, client))
                forgotten += [
                    (aggregate_key(self.partition, start, client, sku), None) for sku in window.skus
                ]
                forgotten.append((window_key(self.partition, start, client), None))
            self._clients_by_start[start] &= kept
            if not self._clients_by_start[start]:
                del self._clients_by_start[start]
        return forgotten

    def _next_meta(self, cutoff: int, progress: UsageProgress | None) -> Meta:
        counters, meta = self.meta.counters, self.meta
        return replace(
            self.meta,
            applied_offset=cutoff,
            appended_at=self._appended_at,
            watermark=self.watermark,
            published_until=progress.published_until if progress else meta.published_until,
            accounted_until=progress.accounted_until if progress else meta.accounted_until,
            counters=Counters(
                counters.first_offset,
                counters.accepted + len(self._rows),
                counters.duplicates + self._duplicates,
                counters.dead_letters + len(self._dead),
                counters.skipped + self._skipped,
                counters.unknown,
            ),
        )


def _require_in_range(sums: SkuTotal, event: UsageEvent, reason: Reason, what: str) -> None:
    """Refuse an event that would lead sums out of int64."""
    after = (sums.credits_micro if event.billable else sums.free_credits_micro) + event.credits_micro
    if not -INT64_MAX <= after <= INT64_MAX:
        raise DeadLetterError(reason, f"{what} would add up to {after} micro-credits")


def _add(sums: SkuTotal, event: UsageEvent) -> None:
    if event.billable:
        sums.count += 1
        sums.credits_micro += event.credits_micro
    else:
        sums.free_count += 1
        sums.free_credits_micro += event.credits_micro
