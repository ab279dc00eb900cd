"""A client's credit bucket and the state of its shard: the rules of quota, without Redis and without a clock.

`quota/bucket.lua` and `quota/shard.lua` are the same rules on the server; tests run both side by side. The
rules are named Q1 to Q9 as in the design. Operations are arrays, answers are strings, here and there:

    ["r", rid, n, ttl_ms]             reserve: "g <deadline> <gen>" granted, or already held with the same n;
                                      "r <available>" not enough, not remembered; "c" closed;
                                      "d" settled before; "t" voided or expired before, refused for good;
                                      "x <n>" held with another amount
    ["s", rid, parts, final]          settle: "ok". A part is [topic id, partition, offset, credits]; final is
                                      1 or 0. Any generation, any order, an unknown id too
    ["v", rid]                        void: "ok"; "s" had parts or was settled; "u" unknown
    ["n", rid, n, ttl_ms, gen]        renew: "g <deadline> <gen>"; "l" lapsed. `n` is the whole amount
                                      reserved, `gen` the generation it was reserved in: in a newer one the
                                      hold is taken again, whatever is available
    ["l", rid, seq, hold, parts, ttl_ms, gen]
                                      statement of a lease: "g <deadline> <hold>"; "o" an older number; "l"
                                      lapsed. Parts count in any case; `gen` as with renew, or missing
    ["b"]                             balance: "<granted> <consumed> <provisional> <reserved> <available>
                                      <open> <gen> <period start>", the last "-" without a period
    ["T", topic, p, cutoff, life]     total: "ok"; "o" an older cutoff; "!" same cutoff, other amount
    ["G", grant_id, amount]           prepaid grant: "ok"; "o" known
    ["P", period_start, base, amount] baseline: "ok"; "o" this period or a later one is known
    ["A", level, epoch]               mark an alert raised: "1" first; "0" known
    ["e"]                             sweep: "ok <holds expired>"

Any of them may answer "e <why>": refused, nothing changed. Amounts are integer micro-credits, times are
milliseconds. In a renewal `n` counts only where there is no record: a hold that stands stays what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

__all__ = [
    "BUCKET_MICRO_MAX",
    "PARTS_MAX",
    "SWEEP_MAX",
    "SWEEP_MS",
    "TERMINAL_KEEP_MS",
    "TTL_MS_MAX",
    "Bucket",
    "BucketBalance",
    "Record",
    "Shard",
    "parse_balance",
    "why_refused",
]

BUCKET_MICRO_MAX = 2**53 - 1
"""A script counts in doubles: 9.007 billion credits are exact, an operation beyond is refused."""

TTL_MS_MAX = 86_400_000
"""A hold asked for longer is a mistake of units. (The library's own limit is far lower.)"""

TERMINAL_KEEP_MS = 3_600_000
"""How long an ended reservation is remembered, so that a late second call finds it. Money doesn't need it (a
late settle is covered by the progress, a late reserve expires); memory limits it: 1,000 reservations a second
for one client are 3.6 million records."""

PARTS_MAX = 1_000
"""Parts of one reservation: its record is rewritten with each settle."""

SWEEP_MS = 1_000
"""How soon the sweep looks again at a bucket with provisional entries or overdue holds."""

SWEEP_MAX = 1_000
"""Records one sweep looks at, a few milliseconds of the server's time."""

Parts = Sequence[Sequence[Any]]
_Position = tuple[str, int, int]
_Source = tuple[str, int]

_TOO_LARGE = f"e beyond {BUCKET_MICRO_MAX} micro-credits a bucket is not exact"
_SHAPES = {
    "r": "a reservation id, micro-credits and a time to live",
    "s": "a reservation id, parts [topic id, partition, offset, micro-credits], and 1 or 0",
    "v": "a reservation id",
    "n": "a reservation id, micro-credits, a time to live and a generation",
    "l": "a reservation id, a number, micro-credits, parts, a time to live and a generation",
    "b": "nothing",
    "T": "a topic id, a partition, an offset and micro-credits",
    "G": "an id and micro-credits",
    "P": "the start of a period and two amounts of micro-credits",
    "A": "a level and an epoch",
    "e": "nothing",
}


class BucketBalance(NamedTuple):
    """A bucket at one instant, in micro-credits. available = granted - consumed - provisional - reserved."""

    granted: int
    consumed: int
    provisional: int
    reserved: int
    available: int
    open: bool
    generation: int
    period_start: int | None
    """Milliseconds; None: no baseline yet, prepaid grants only."""


def parse_balance(answer: str) -> BucketBalance:
    """Read the answer to `["b"]`."""
    *amounts, is_open, generation, period = answer.split(" ")
    granted, consumed, provisional, reserved, available = map(int, amounts)
    start = None if period == "-" else int(period)
    return BucketBalance(
        granted, consumed, provisional, reserved, available, is_open == "1", int(generation), start
    )


@dataclass(slots=True)
class Shard:
    """What the clients of one shard share.

    Attributes:
        server_run: the id of the running server process.
        run: the id under which the generation began or was adopted.
        published_until: by source partition: offset up to which every total is applied.
        accounted_until: by source partition: log time (ms) up to which everything is accounted.
    """

    server_run: str = "run"
    run: str = ""
    generation: int = 0
    open: bool = False
    beat_number: int = 0
    partitions: int = 0
    topic_id: str = ""
    skew_ms: int = 0
    published_until: dict[_Source, int] = field(default_factory=dict)
    accounted_until: dict[_Source, int] = field(default_factory=dict)

    @property
    def trusted(self) -> bool:
        """The server hasn't been restarted, and has lost nothing, since the generation began."""
        return self.generation > 0 and self.run == self.server_run

    def begin(self, generation: int, *, partitions: int, topic_id: str, skew_ms: int) -> str:
        """A new, closed generation (Q8): "ok", "o" not newer than the known one."""
        if generation <= self.generation:
            return "o"
        self.run, self.generation, self.open, self.beat_number = self.server_run, generation, False, 0
        self.partitions, self.topic_id, self.skew_ms = partitions, topic_id, skew_ms
        self.published_until.clear()
        self.accounted_until.clear()
        return "ok"

    def adopt(self, generation: int) -> str:
        """The generation goes on after a restart that lost nothing: "ok", "0" another generation."""
        if generation == 0 or generation != self.generation:
            return "0"
        self.run = self.server_run
        return "ok"

    def beat(self, generation: int, number: int, *, partitions: int, topic_id: str) -> str:
        """The guardian's heartbeat: "ok <previous number>", "0" another generation, "r" restarted since."""
        if refusal := self._refusal(generation):
            return refusal
        before, self.beat_number = self.beat_number, max(self.beat_number, number)
        self.partitions, self.topic_id = max(self.partitions, partitions), topic_id
        return f"ok {before}"

    def progress(self, generation: int, topic_id: str, partition: int, published: int, accounted: int) -> str:
        """How far the log is accounted in these buckets (Q5), only grows: "ok", "0", "r" as with `beat`."""
        if refusal := self._refusal(generation):
            return refusal
        at = (topic_id, partition)
        self.published_until[at] = max(self.published_until.get(at, -2), published)
        self.accounted_until[at] = max(self.accounted_until.get(at, -2), accounted)
        return "ok"

    def open_up(self, generation: int) -> str:
        """The rebuild is complete: "ok", "0", "r" as with `beat`."""
        if refusal := self._refusal(generation):
            return refusal
        self.open = True
        return "ok"

    def log_clock(self) -> int | None:
        """All appended before this moment, less the skew, is accounted (Q1); None: unknown of a partition."""
        times = [self.accounted_until.get((self.topic_id, p)) for p in range(self.partitions)]
        known = [time for time in times if time is not None]
        return min(known) - self.skew_ms if known and len(known) == len(times) else None

    def _refusal(self, generation: int) -> str | None:
        if generation == 0 or generation != self.generation:
            return "0"
        return None if self.run == self.server_run else "r"


@dataclass(slots=True)
class Record:
    """A reservation.

    Attributes:
        state: held | settled | void | expired.
        hold: what still stands against the bucket; 0 when ended.
        reserved: the amount first asked for.
        time: a hold's deadline; of an ended one, when it is forgotten.
        seq: number of the last statement of a lease.
        positions: parts settled, so that a repeated one lowers the hold once. A lease keeps none.
        had_parts: of a lease: there were some.
    """

    state: str
    hold: int
    reserved: int
    time: int
    seq: int = 0
    positions: set[_Position] = field(default_factory=set)
    had_parts: bool = False


class Bucket:
    """One client's bucket. Every method answers as the module's text says; `now` is the server's time."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._reset()

    def _reset(self) -> None:
        self.generation = self.shard.generation
        self.granted = self.base = 0
        self.period_start: int | None = None
        self.totals: dict[_Source, tuple[int, int]] = {}
        self.provisional: set[tuple[_Position, int]] = set()
        self.records: dict[str, Record] = {}
        self.grants: set[str] = set()
        self.alerts: set[tuple[Any, Any]] = set()

    # ------------------------------------------------------------------ amounts

    @property
    def life(self) -> int:
        """Lifetime usage, over all source partitions."""
        return sum(life for _, life in self.totals.values())

    @property
    def provisional_sum(self) -> int:
        """Settled, not yet covered by a total."""
        return sum(credits_micro for _, credits_micro in self.provisional)

    @property
    def reserved(self) -> int:
        """Held by reservations and leases."""
        return sum(record.hold for record in self.records.values())

    @property
    def available(self) -> int:
        """What can still be reserved; below 0: debt."""
        return self.granted - (self.life - self.base) - self.provisional_sum - self.reserved

    def _fits(self, *, granted: int = 0, base: int = 0, life: int = 0, prov: int = 0, held: int = 0) -> bool:
        """Whether every amount stays exact after these changes, as the server computes them."""
        changed_life = life
        granted, base, life = self.granted + granted, self.base + base, self.life + life
        prov, held = self.provisional_sum + prov, self.reserved + held
        left = granted - (life - base)
        amounts = (
            changed_life,
            granted,
            base,
            life,
            prov,
            held,
            life - base,
            left,
            left - prov,
            left - prov - held,
        )
        return all(-BUCKET_MICRO_MAX <= amount <= BUCKET_MICRO_MAX for amount in amounts)

    # ------------------------------------------------------------------ operations

    def apply(self, op: Sequence[Any], now: int) -> str:
        """Answer one operation, given as the array a script takes."""
        if self.generation != self.shard.generation:
            self._reset()
        return why_refused(op) or self._OPERATIONS[op[0]](self, op, now)

    def reserve(self, rid: str, n: int, ttl_ms: int, now: int) -> str:
        """Take a hold before the work (Q4: the id is a task's attempt)."""
        return self.apply(("r", rid, n, ttl_ms), now)

    def settle(self, rid: str, parts: Parts, final: bool, now: int) -> str:  # noqa: FBT001 - as in the rules
        """The work's events are in the log at these positions (Q2)."""
        return self.apply(("s", rid, parts, int(final)), now)

    def void(self, rid: str, now: int) -> str:
        """There was no work, and nothing was or will be published (Q3)."""
        return self.apply(("v", rid), now)

    def renew(self, rid: str, n: int, ttl_ms: int, generation: int, now: int) -> str:
        """The work goes on."""
        return self.apply(("n", rid, n, ttl_ms, generation), now)

    def lease(  # noqa: PLR0917 - as in the rules
        self, rid: str, seq: int, hold: int, parts: Parts, ttl_ms: int, generation: int, now: int
    ) -> str:
        """What the holder of a lease needs from now on, as its `seq`-th statement (Q7)."""
        return self.apply(("l", rid, seq, hold, parts, ttl_ms, generation), now)

    def balance(self) -> BucketBalance:
        """All amounts at once."""
        return parse_balance(self.apply(("b",), 0))

    def total(self, topic_id: str, partition: int, cutoff: int, life: int) -> str:
        """What the log says the client has used, up to the cutoff."""
        return self.apply(("T", topic_id, partition, cutoff, life), 0)

    def grant(self, grant_id: str, amount: int) -> str:
        """Prepaid credits."""
        return self.apply(("G", grant_id, amount), 0)

    def baseline(self, period_start: int, base: int, amount: int) -> str:
        """A new period's budget, and the lifetime usage it counts from (Q9)."""
        return self.apply(("P", period_start, base, amount), 0)

    def expire(self, now: int) -> str:
        """End holds by the log's clock (Q1), drop what the progress covers (Q5), forget old records."""
        return self.apply(("e",), now)

    # ------------------------------------------------------------------ rules

    def _reserve(self, op: Sequence[Any], now: int) -> str:
        _, rid, n, ttl = op
        if not self.shard.trusted:
            return "c"
        if known := self.records.get(rid):
            if known.state != "held":
                return "d" if known.state == "settled" else "t"
            return self._granted(known) if known.reserved == n else f"x {known.reserved}"
        if not self.shard.open:
            return "c"
        if self.available < n:
            return f"r {self.available}"
        self.records[rid] = Record("held", n, n, now + ttl)
        return self._granted(self.records[rid])

    def _settle(self, op: Sequence[Any], now: int) -> str:
        _, rid, parts, final = op
        record = self.records.get(rid)
        if record is None and final == 1:
            record = Record("unknown", 0, 0, 0)
        hold, positions = (record.hold, set(record.positions)) if record else (0, set())
        fresh: list[tuple[str, int, int, int]] = []
        for topic_id, partition, offset, credits_micro in parts if record else ():
            position = (topic_id, partition, offset)
            if position not in positions:
                positions.add(position)
                fresh.append((topic_id, partition, offset, credits_micro))
                hold -= min(hold, credits_micro)
        if record and fresh and len(positions) > PARTS_MAX:
            return f"e a reservation has at most {PARTS_MAX} parts"
        sources = self._uncovered(fresh if record else parts)
        added = sum(credits_micro for _, credits_micro in sources)
        if not self._fits(prov=added, held=hold - (record.hold if record else 0)):
            return _TOO_LARGE
        self.provisional |= sources
        if record:
            record.hold, record.positions = hold, positions
            self.records[rid] = record
            if final == 1 and record.state != "settled":
                self._end(record, "settled", now)
        return "ok"

    def _void(self, op: Sequence[Any], now: int) -> str:
        record = self.records.get(op[1])
        if record is None:
            # Remembered: a reserve under way when its caller gave up must not take a hold that nobody frees.
            self.records[op[1]] = Record("void", 0, 0, now + TERMINAL_KEEP_MS)
            return "u"
        if record.state == "held":
            self._end(record, "settled" if record.positions or record.had_parts else "void", now)
        return "s" if record.state == "settled" else "ok"

    def _renew(self, op: Sequence[Any], now: int) -> str:
        _, rid, n, ttl, *generation = op
        record = self.records.get(rid)
        if record is None:
            if not self._lost_since(generation):
                return "l"
            if not self._fits(held=n):
                return _TOO_LARGE
            record = self.records[rid] = Record("held", n, n, now + ttl)
        if record.state != "held":
            return "l"
        record.time = max(record.time, now + ttl)
        return self._granted(record)

    def _lease(self, op: Sequence[Any], now: int) -> str:
        _, rid, seq, hold, parts, ttl, *generation = op
        record = self.records.get(rid)
        asserts = record is None and self._lost_since(generation)
        sources = self._uncovered(parts)
        added = sum(credits_micro for _, credits_micro in sources)
        if not self._fits(prov=added, held=hold if asserts else 0):
            return _TOO_LARGE
        self.provisional |= sources
        if asserts:
            self.records[rid] = Record("held", hold, hold, now + ttl, seq, had_parts=bool(parts))
            return f"g {now + ttl} {hold}"
        if record is None or record.state != "held":
            return "l"
        if seq <= record.seq:
            return "o"
        # What its parts were held for is provisional, or charged, from now on: only the rest still stands.
        standing = max(0, record.hold - sum(part[3] for part in parts))
        if hold > standing and (not self._is_open or self.available < hold - record.hold):
            hold = standing
        record.hold, record.seq, record.time = hold, seq, max(record.time, now + ttl)
        record.had_parts = record.had_parts or bool(parts)
        return f"g {record.time} {hold}"

    def _balance(self, _op: Sequence[Any], _now: int) -> str:
        amounts = (self.granted, self.life - self.base, self.provisional_sum, self.reserved, self.available)
        period = "-" if self.period_start is None else self.period_start
        return f"{' '.join(map(str, amounts))} {int(self._is_open)} {self.generation} {period}"

    def _total(self, op: Sequence[Any], _now: int) -> str:
        _, topic_id, partition, cutoff, life = op
        at = (topic_id, partition)
        known_cutoff, known_life = self.totals.get(at, (-1, 0))
        if cutoff <= known_cutoff:
            return "!" if cutoff == known_cutoff and life != known_life else "o"
        if not self._fits(life=life - known_life):
            return _TOO_LARGE
        self.totals[at] = (cutoff, life)
        self._drop(at, cutoff)
        return "ok"

    def _grant(self, op: Sequence[Any], _now: int) -> str:
        _, grant_id, amount = op
        if grant_id in self.grants:
            return "o"
        if not self._fits(granted=amount):
            return _TOO_LARGE
        self.grants.add(grant_id)
        self.granted += amount
        return "ok"

    def _baseline(self, op: Sequence[Any], _now: int) -> str:
        _, start, base, amount = op
        if self.period_start is not None and start <= self.period_start:
            return "o"
        if not self._fits(granted=amount - self.granted, base=base - self.base):
            return _TOO_LARGE
        self.period_start, self.base, self.granted = start, base, amount
        return "ok"

    def _alert(self, op: Sequence[Any], _now: int) -> str:
        mark = (op[1], op[2])
        if mark in self.alerts:
            return "0"
        self.alerts.add(mark)
        return "1"

    def _sweep(self, _op: Sequence[Any], now: int) -> str:
        accounted = self.shard.log_clock()
        due = sorted(
            (record.time, rid.encode(), rid) for rid, record in self.records.items() if record.time < now
        )
        expired = 0
        for _, _, rid in due[:SWEEP_MAX]:
            record = self.records[rid]
            if record.state != "held":
                del self.records[rid]
            elif accounted is not None and accounted >= record.time:
                self._end(record, "expired", now)
                expired += 1
        for at in {(topic_id, partition) for (topic_id, partition, _), _ in self.provisional}:
            self._drop(at, self.shard.published_until.get(at, -1))
        return f"ok {expired}"

    # ------------------------------------------------------------------ steps

    @property
    def _is_open(self) -> bool:
        return self.shard.trusted and self.shard.open

    def _granted(self, record: Record) -> str:
        return f"g {record.time} {self.generation}"

    def _lost_since(self, callers_generation: Sequence[int]) -> bool:
        """A hold may be taken again only where the caller's generation, or its server, was lost."""
        return not self.shard.trusted or any(known < self.generation for known in callers_generation)

    def _end(self, record: Record, state: str, now: int) -> None:
        record.state, record.hold, record.time = state, 0, now + TERMINAL_KEEP_MS

    def _uncovered(self, parts: Parts) -> set[tuple[_Position, int]]:
        """The parts nothing covers yet. One position with two amounts counts twice until something does."""
        found = set()
        for topic_id, partition, offset, credits_micro in parts:
            at = (topic_id, partition)
            cutoff = self.totals.get(at, (-1, 0))[0]
            if credits_micro and offset > max(cutoff, self.shard.published_until.get(at, -1)):
                found.add(((topic_id, partition, offset), credits_micro))
        return found - self.provisional

    def _drop(self, at: _Source, upto: int) -> None:
        self.provisional = {entry for entry in self.provisional if entry[0][:2] != at or entry[0][2] > upto}

    _OPERATIONS: ClassVar[dict[str, Callable[[Bucket, Sequence[Any], int], str]]] = {
        "r": _reserve,
        "s": _settle,
        "v": _void,
        "n": _renew,
        "l": _lease,
        "b": _balance,
        "T": _total,
        "G": _grant,
        "P": _baseline,
        "A": _alert,
        "e": _sweep,
    }


def why_refused(op: Sequence[Any]) -> str | None:
    """The answer to an operation of a wrong shape; None: it can be done."""
    kind = op[0] if op else ""
    check = _CHECKS.get(kind)
    if check is None:
        return f"e unknown operation {kind!r}"
    try:
        right = check(*op[1:])
    except TypeError:
        right = False
    return None if right else f"e {kind} takes {_SHAPES[kind]}"


def _whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= BUCKET_MICRO_MAX


def _amount(value: Any) -> bool:
    return _whole(value, -BUCKET_MICRO_MAX)


def _ttl(value: Any) -> bool:
    return type(value) is int and 1 <= value <= TTL_MS_MAX


def _name(value: Any) -> bool:
    return type(value) is str and value != ""


def _topic(value: Any) -> bool:
    """As Kafka writes a topic id. It stands in keys and lists, between colons, commas and blanks."""
    return type(value) is str and _TOPIC_ID.fullmatch(value) is not None


def _parts(parts: Any) -> bool:
    return type(parts) in {list, tuple} and all(_part(*part) for part in parts)


def _part(topic_id: Any, partition: Any, offset: Any, credits_micro: Any) -> bool:
    return _topic(topic_id) and _whole(partition) and _whole(offset) and _whole(credits_micro)


_TOPIC_ID = re.compile(r"[A-Za-z0-9_.+/=-]{1,64}")  # base64, in either alphabet
_CHECKS: dict[str, Callable[..., bool]] = {
    "r": lambda rid, n, ttl: _name(rid) and _whole(n) and _ttl(ttl),
    "s": lambda rid, parts, final: _name(rid) and _parts(parts) and final in {0, 1},
    "v": _name,
    "n": lambda rid, n, ttl, gen=0: _name(rid) and _whole(n) and _ttl(ttl) and _whole(gen),
    "l": lambda rid, seq, hold, parts, ttl, gen=0: (
        _name(rid) and _whole(seq, 1) and _whole(hold) and _parts(parts) and _ttl(ttl) and _whole(gen)
    ),
    "b": lambda: True,
    "T": lambda topic_id, p, cutoff, life: (
        _topic(topic_id) and _whole(p) and _whole(cutoff) and _amount(life)
    ),
    "G": lambda grant_id, amount: _name(grant_id) and _amount(amount),
    "P": lambda start, base, amount: _whole(start) and _amount(base) and _amount(amount),
    "A": lambda level, epoch: _whole(level) and (_whole(epoch) or _name(epoch)),
    "e": lambda: True,
}
