"""Are the credit buckets right? Each is compared with the log, and the log's totals with the ledger's events.

    bucket     = credit.grants and usage.totals, computed here a second time (`statements`)
    totals     = the ledger's sums, per client and source partition, up to the cutoff

None of the code that moves credits is used. While usage is in flight, a bucket may stand at any statement
the log made since the check began to read, so that only what stays different is a difference; what is not
equal at once is looked at again until the time given for it is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from meterline.domain.clients import Client, QuotaPolicy
from meterline.ledger.asker import LedgerAsker
from meterline.ledger.quota_reports import (
    LifetimeSum,
    UnreservedUsage,
    busiest_minutes,
    lifetime_sums,
    positions_present,
    reserved_usage,
    source_partitions,
    unreserved_usage,
)
from meterline.quota.inspect import Bucket, BucketReader, Reservation, Shard, Source
from meterline.quota.statements import Funds, LogStatements, Total

__all__ = [
    "Difference",
    "ExposureTerm",
    "LostReservation",
    "QuotaCheck",
    "Report",
    "differences",
    "lost_work",
]

LOOK_AGAIN_S = 0.5
"""The quota worker applies and sweeps each second: looking more often finds nothing new."""
BUCKETS_AT_A_TIME = 2_000
"""Held in memory, a few kilobytes each."""
DAY_MS = 86_400_000
REMEMBERED_MS = DAY_MS
"""How long a bucket remembers a reservation that ended."""
EVENTS_SINCE_MS = 3 * DAY_MS
"""Events of remembered reservations are not older than that and the longest task."""
CLOCKS_MS = 60_000
"""As far as the clocks of Redis and the brokers may be apart."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that must be equal and is not; amounts in micro-credits.

    Attributes:
        client_id: "": it concerns all clients.
    """

    client_id: str
    what: str
    found: str
    expected: str


@dataclass(frozen=True, slots=True)
class LostReservation:
    """Settled work of which the log has nothing: a duplicate, a conflict, a dead letter, or lost."""

    client_id: str
    reservation_id: str
    topic_id: str
    partition: int
    offset: int
    credits_micro: int


@dataclass(frozen=True, slots=True)
class ExposureTerm:
    """One way in which more can be used than was granted, and how much of it there is.

    Attributes:
        count: reservations, events or clients.
    """

    term: str
    credits_micro: int
    count: int
    means: str


@dataclass(slots=True)
class Report:
    """What was found. No differences: everything is equal."""

    generation: int = 0
    buckets: int = 0
    totals: int = 0
    differences: list[Difference] = field(default_factory=list)
    lost: list[LostReservation] = field(default_factory=list)
    unreserved: list[UnreservedUsage] = field(default_factory=list)
    exposure: list[ExposureTerm] = field(default_factory=list)
    passed_by: int = 0
    """Records of the two topics that could not be read; the quota worker passes them by, too."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


@dataclass(slots=True)
class _Seen:
    """What later steps need of the buckets, added up while they are read."""

    ended: dict[str, list[Reservation]] = field(default_factory=dict)
    above_micro: int = 0
    above_count: int = 0
    debt_micro: int = 0
    debt_count: int = 0
    lapsed_leases_micro: int = 0
    lapsed_leases_count: int = 0


class QuotaCheck:
    """One run over everything."""

    def __init__(
        self,
        reader: BucketReader,
        log: LogStatements,
        ledger: LedgerAsker,
        clients: Mapping[str, Client],
        *,
        only: Collection[str] = (),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Look at all clients, or at some.

        Args:
            reader: of the buckets.
            log: not read yet.
            ledger: asked for sums and events.
            clients: as the registry has them; one that is missing has the registry's defaults.
            only: ids of the clients to look at; none: all.
            say: told what takes long.
        """
        self._reader = reader
        self._log = log
        self._ledger = ledger
        self._clients = clients
        self._only = frozenset(only)
        self._say = say

    def run(self, wait_s: float) -> Report:
        """Compare everything.

        Args:
            wait_s: how long the buckets may take to catch up with the log as it was when the check began.

        Raises:
            UserError, RetryLater: Redis, Kafka or the ledger does not answer.
        """
        report, seen = Report(), _Seen()
        self._log.read_to_end()
        deadline = time.monotonic() + wait_s
        report.differences += self._wait_for_shards(report, deadline)
        report.differences += self._wait_for_buckets(report, seen, deadline)
        report.differences += [Difference("", text, "", "one amount") for text in self._log.contradictions]
        report.differences += self._compare_with_ledger(report)
        report.lost = [
            lost
            for client_id, reservations in sorted(seen.ended.items())
            for lost in lost_work(self._ledger, client_id, reservations, self._log.progress)
        ]
        report.unreserved, unreserved = self._unreserved_work()
        report.exposure = self._exposure(seen, unreserved)
        report.passed_by = self._log.not_understood
        return report

    def _wait_for_shards(self, report: Report, deadline: float) -> list[Difference]:
        """Every shard is open, of one generation, and says no more of the log than the log does."""
        while True:
            shards = self._reader.shards()
            self._log.read_to_end()
            found = self._shard_differences(shards)
            if not found or time.monotonic() > deadline:
                report.generation = max(shard.generation for shard in shards)
                return found
            self._say(f"waiting: {found[0].what} is {found[0].found}")
            time.sleep(LOOK_AGAIN_S)

    def _shard_differences(self, shards: Sequence[Shard]) -> list[Difference]:
        newest = max(shard.generation for shard in shards)
        if older := [shard.number for shard in shards if shard.generation != newest or not newest]:
            return [
                Difference(
                    "", "generation", f"none or an older one in {len(older)} shards", str(newest or "one")
                )
            ]
        closed = [shard.number for shard in shards if not (shard.is_open and self._reader.is_believed(shard))]
        if closed:
            return [Difference("", "buckets", f"closed in {len(closed)} of {len(shards)} shards", "open")]
        found = []
        for shard in shards:
            for source, published in shard.published_until.items():
                _, said = self._log.progress.get(source, (-1, -1))
                if published > said:
                    what = f"progress of {_place(source)} in shard {shard.number}"
                    found.append(Difference("", what, f"offset {published}", f"{said} or less"))
        return found

    def _wait_for_buckets(self, report: Report, seen: _Seen, deadline: float) -> list[Difference]:
        """Every bucket stands where the log says."""
        waiting = sorted(self._only or self._log.clients() | set(self._reader.client_ids()))
        report.buckets = len(waiting)
        while True:
            last = deadline < time.monotonic()
            found: dict[str, list[Difference]] = {}
            for first in range(0, len(waiting), BUCKETS_AT_A_TIME):
                found |= self._compare_buckets(waiting[first : first + BUCKETS_AT_A_TIME], seen, last=last)
            if last or not found:
                return [one for of_client in found.values() for one in of_client]
            waiting = list(found)
            self._say(f"waiting for {len(waiting)} buckets, e.g. {waiting[0]}: {found[waiting[0]][0].what}")
            time.sleep(LOOK_AGAIN_S)

    def _compare_buckets(
        self, client_ids: Sequence[str], seen: _Seen, *, last: bool
    ) -> dict[str, list[Difference]]:
        """Those that are different; the others, and at the last look all, are added to what was seen."""
        buckets = {client_id: self._reader.bucket(client_id) for client_id in client_ids}
        self._log.read_to_end()  # after the buckets: what they know, it knows
        different = {}
        for client_id, bucket in buckets.items():
            if found := differences(client_id, bucket, self._log):
                different[client_id] = found
            if bucket is not None and (last or not found):
                _note(bucket, seen)
        return different

    def _compare_with_ledger(self, report: Report) -> list[Difference]:
        """Each newest total is what the ledger holds up to its cutoff; no accounted event has no total.

        Up to the progress every total that changed is published: it holds there, too, and so an event that no
        total knows of is found.
        """
        self._log.read_to_end()
        newest: dict[Source, dict[str, Total]] = {}
        for client_id in self._chosen(self._log.clients()):
            for source, totals in self._log.totals(client_id).items():
                newest.setdefault(source, {})[client_id] = totals[-1]
                report.totals += 1
        found = []
        for place, rows in self._ledger.ask(source_partitions).items():
            source = Source(*place)
            if source in self._log.progress:
                newest.setdefault(source, {})
            elif source not in newest and not self._only:
                what = f"totals of {_place(source)}"
                found.append(Difference("", what, "none", f"some: the ledger has {rows} events of it"))
        for source in sorted(newest):
            found += self._compare_source(source, newest[source])
        return found

    def _compare_source(self, source: Source, totals: Mapping[str, Total]) -> list[Difference]:
        _, published = self._log.progress.get(source, (-1, -1))
        later = {client_id: total.cutoff for client_id, total in totals.items() if total.cutoff > published}
        sums = self._ledger.ask(lifetime_sums, source, published, later)
        found = []
        for client_id in sorted(self._chosen(totals.keys() | sums.keys())):
            total = totals.get(client_id)
            said = LifetimeSum() if total is None else LifetimeSum(*total[1:])
            held = sums.get(client_id, LifetimeSum())
            if said != held:
                upto = later.get(client_id, published)
                what = f"total of {_place(source)} up to offset {upto} beside the ledger"
                found.append(Difference(client_id, what, _words(said), _words(held)))
        return found

    def _unreserved_work(self) -> tuple[list[UnreservedUsage], list[UnreservedUsage]]:
        """Events without a reservation, since the client has credits: where the policy wants one, and all."""
        since = {
            client_id: first
            for client_id in self._chosen(self._log.clients())
            if (first := self._log.first_granted_at(client_id)) is not None
        }
        everything = self._ledger.ask(unreserved_usage, since)
        unwanted = [usage for usage in everything if self._policy(usage.client_id) is QuotaPolicy.DENY]
        return unwanted, everything

    def _chosen(self, client_ids: AbstractSet[str]) -> AbstractSet[str]:
        return client_ids & self._only if self._only else client_ids

    def _policy(self, client_id: str) -> QuotaPolicy:
        return self._clients.get(client_id, Client(client_id)).quota_policy

    def _exposure(self, seen: _Seen, unreserved: Iterable[UnreservedUsage]) -> list[ExposureTerm]:
        """The terms by which more may be used than was granted, as the model of the rules has them."""
        late_micro = late_count = 0
        for client_id, reservations in sorted(seen.ended.items()):
            ids = [one.reservation_id for one in reservations if one.state in {"expired", "void"}]
            used = self._ledger.ask(reserved_usage, client_id, ids, _now_ms() - EVENTS_SINCE_MS)
            late_count += len(used)
            late_micro += sum(charged for _, charged in used.values())
        outside = list(unreserved)
        allowed = [
            client_id
            for client_id, client in self._clients.items()
            if client.quota_policy is QuotaPolicy.ALLOW and (not self._only or client_id in self._only)
        ]
        minutes = self._ledger.ask(busiest_minutes, allowed, _now_ms() - DAY_MS)
        return [
            ExposureTerm(
                "published after its reservation ended",
                late_micro,
                late_count,
                "work under reservations that expired or were voided in the last day",
            ),
            ExposureTerm(
                "used above what was reserved",
                seen.above_micro,
                seen.above_count,
                "settled reservations of the last day whose parts cost more than they held",
            ),
            ExposureTerm(
                "without a reservation",
                sum(usage.credits_micro for usage in outside),
                sum(usage.events for usage in outside),
                "events since the client has credits; charged all the same",
            ),
            ExposureTerm(
                "leases past their deadline",
                seen.lapsed_leases_micro,
                seen.lapsed_leases_count,
                "what a stalled holder may still give out; none if it stops at its deadline",
            ),
            ExposureTerm(
                "in debt now", seen.debt_micro, seen.debt_count, "clients whose available credits are below 0"
            ),
            ExposureTerm(
                "each minute without Redis",
                sum(minutes.values()),
                len(allowed),
                "clients with policy allow: their busiest minutes of the last day together",
            ),
        ]


def differences(client_id: str, bucket: Bucket | None, log: LogStatements) -> list[Difference]:
    """What is wrong with a bucket, as far as the log was read."""
    funds, totals = log.funds(client_id), log.totals(client_id)
    if bucket is None:
        if Funds() in funds and not totals:
            return []
        return [
            Difference(client_id, "bucket", "none", f"one with {_micro(funds[-1].granted_micro)} granted")
        ]
    found = [
        *_funds_differences(bucket, funds),
        *_totals_differences(bucket, totals),
        *_provisional_differences(bucket),
        *_hold_differences(bucket),
    ]
    return [Difference(client_id, *texts) for texts in found]


Texts = tuple[str, str, str]
"""What, found, expected."""


def lost_work(
    ledger: LedgerAsker,
    client_id: str,
    reservations: Iterable[Reservation],
    progress: Mapping[Source, tuple[int, int]],
) -> list[LostReservation]:
    """Settled parts that must be accounted by now, and of which the ledger has no event.

    Args:
        ledger: asked for the events at their positions.
        reservations: ended ones; a part of one that is held may be on its way.
        progress: of each source partition accounted until (log time, ms), published until (offset).
    """
    parts = {}
    for reservation in reservations:
        ended_at = reservation.time - REMEMBERED_MS
        for part in reservation.parts:
            until, published = progress.get(part.source, (-1, -1))
            # Its position was acknowledged before it was settled: so it is in what is accounted, or nowhere.
            if part.offset <= published or until >= ended_at + CLOCKS_MS:
                position = (part.source.topic_id, part.source.partition, part.offset)
                parts[position] = (reservation.reservation_id, part.credits_micro)
    present = ledger.ask(positions_present, client_id, parts, _now_ms() - EVENTS_SINCE_MS)
    return [
        LostReservation(client_id, reservation_id, *position, charged)
        for position, (reservation_id, charged) in sorted(parts.items())
        if position not in present
    ]


def _funds_differences(bucket: Bucket, funds: Sequence[Funds]) -> list[Texts]:
    found = Funds(bucket.granted_micro, bucket.base_micro, bucket.period_start)
    if found in funds:
        return []
    names = ("granted", "base", "period start")
    pairs = zip(names, found, funds[-1], strict=True)
    return [(name, _micro(here), _micro(there)) for name, here, there in pairs if here != there]


def _totals_differences(bucket: Bucket, totals: Mapping[Source, Sequence[Total]]) -> list[Texts]:
    found = []
    for source in sorted(bucket.totals.keys() | totals.keys()):
        stands = bucket.totals.get(source)
        said = [(total.cutoff, total.credits_micro) for total in totals.get(source, [])]
        if stands not in said:
            found.append(
                (f"consumed from {_place(source)}", _statement(stands), _statement(said and said[-1]))
            )
    total = sum(life for _, life in bucket.totals.values())
    if total != bucket.lifetime_micro:
        found.append(
            ("lifetime consumption", _micro(bucket.lifetime_micro), f"{_micro(total)}, its terms' sum")
        )
    return found


def _provisional_differences(bucket: Bucket) -> list[Texts]:
    found = []
    total = sum(entry.credits_micro for entry in bucket.provisional)
    if total != bucket.provisional_micro:
        found.append(("provisional", _micro(bucket.provisional_micro), f"{_micro(total)}, its entries' sum"))
    for entry in bucket.provisional:
        cutoff, _ = bucket.totals.get(entry.source, (-1, 0))
        accounted = max(cutoff, bucket.shard.published_until.get(entry.source, -1))
        if entry.offset <= accounted:
            what = f"provisional {_place(entry.source)} offset {entry.offset}"
            found.append((what, _micro(entry.credits_micro), f"nothing: accounted up to {accounted}"))
    return found


def _hold_differences(bucket: Bucket) -> list[Texts]:
    found = []
    reservations = bucket.reservations.values()
    total = sum(one.hold_micro for one in reservations)
    if total != bucket.held_micro:
        found.append(("reserved", _micro(bucket.held_micro), f"{_micro(total)}, its holds' sum"))
    log_time = bucket.shard.log_time
    for one in reservations:
        if one.state != "held" and one.hold_micro:
            found.append((f"reservation {one.reservation_id}", f"{one.state} and holding", "no hold"))
        ends = one.time + bucket.shard.skew_ms
        if one.state == "held" and log_time is not None and log_time >= ends and _now_ms() > ends:
            what = f"reservation {one.reservation_id}"
            found.append(
                (what, f"holds {_micro(one.hold_micro)} past its deadline", "expired by the log's clock")
            )
        if bucket.due.get(one.reservation_id) != one.time:
            found.append((f"reservation {one.reservation_id}", "not among those that are swept", "swept"))
    if (reservations or bucket.provisional) and not bucket.is_watched:
        found.append(("sweep", "never looks at this bucket", "looks"))
    return found


def _note(bucket: Bucket, seen: _Seen) -> None:
    """Add up what the later steps need."""
    ended = [one for one in bucket.reservations.values() if one.state != "held"]
    if ended:
        seen.ended[bucket.client_id] = ended
    for one in bucket.reservations.values():
        above = sum(part.credits_micro for part in one.parts) - one.reserved_micro
        if above > 0:
            seen.above_micro += above
            seen.above_count += 1
        if one.state == "held" and one.seq and one.time < _now_ms():
            seen.lapsed_leases_micro += one.hold_micro
            seen.lapsed_leases_count += 1
    if bucket.available_micro < 0:
        seen.debt_micro -= bucket.available_micro
        seen.debt_count += 1


def _place(source: Source) -> str:
    return f"{source.topic_id}/{source.partition}"


def _statement(total: tuple[int, int] | Sequence[object] | None) -> str:
    return f"{total[1]} micro-credits up to offset {total[0]}" if total else "nothing"


def _words(total: LifetimeSum) -> str:
    return (
        f"{total.events} events {total.credits_micro} micro-credits, "
        f"free {total.free_events} and {total.free_credits_micro}"
    )


def _micro(amount: int | None) -> str:
    return "none" if amount is None else str(amount)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
