"""The bytes of metering's state table: one changelog record per key below, partition first.

    A  aggregate   (window start, client, SKU) -> counts and credits
    W  window      (window start, client)      -> cutoff of the newest published snapshot
    T  total       (client)                    -> all it has ever used, and its newest event's offset
    B  brake                                   -> dead letters it has counted lately (JSON)
    M  meta                                    -> where the partition stands (JSON)

Keys of a partition share its prefix, so that one partition's log is totally ordered and equal keys of two
partitions never meet in Faust's flat store.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field, replace
from sys import intern

from meterline.domain.window_lengths import LengthChange, WindowLengths
from meterline.domain.windows import SkuTotal
from meterline.errors import PartitionHalted

__all__ = [
    "FORMAT_VERSION",
    "GROUP",
    "RULE_VERSION",
    "Counters",
    "Meta",
    "aggregate_key",
    "aggregate_prefix",
    "aggregate_value",
    "brake_key",
    "meta_key",
    "parse_aggregate_key",
    "parse_aggregate_value",
    "parse_published_value",
    "parse_total_key",
    "parse_total_value",
    "parse_window_key",
    "published_value",
    "total_key",
    "total_value",
    "window_key",
]

GROUP = "metering"
"""Consumer group, name of the Faust app, and prefix of the partitions' transactional ids."""

FORMAT_VERSION = 3
"""Of these bytes. An older one is brought up to date when its partition is taken over, a newer one refused.
2 added the totals, which are found in the ledger; 3 lets the length of windows change, and the rules."""
FORMAT_WITHOUT_TOTALS = 1
RULE_VERSION = 1
"""Of the rules that decide a record's fate. A new one holds for what is appended after it has taken over."""

_HEAD = struct.Struct(">HcqH")  # partition, kind, window start, bytes of the client id
_AGGREGATE = struct.Struct(">qqqq")
_OFFSET = struct.Struct(">q")
_PUBLISHED = struct.Struct(">qq")
_TOTAL_HEAD = struct.Struct(">Hc")  # partition, kind


@dataclass(slots=True)
class Counters:
    """What became of every offset of the partition, since its first. They add up to the offsets."""

    first_offset: int = 0
    accepted: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    skipped: int = 0
    """Offsets without a data record: transaction markers and aborted records."""
    unknown: int = 0
    """Offsets of which a repair could not tell what became of them: gone from the log uncounted, or counted
    by a state that is lost and in no ledger row."""


@dataclass(slots=True)
class Meta:
    """Where a partition stands after its last commit."""

    cluster_id: str
    topic_id: str
    applied_offset: int
    appended_at: int
    """Largest append time among the applied records (ms)."""
    watermark: int
    lengths: WindowLengths
    counters: Counters = field(default_factory=Counters)
    published_until: int = -1
    """Offset up to which every total is on `usage.totals`."""
    accounted_until: int = 0
    """Log time (ms): everything appended at or before it is accounted and published."""
    format: int = FORMAT_VERSION
    rules: int = RULE_VERSION
    older_rules: tuple[tuple[int, int], ...] = ()
    """Offset and version: records up to that offset are decided by the rules of that version."""

    def to_bytes(self) -> bytes:
        """JSON: written once a flush, read by people in an emergency."""
        fields = asdict(self)
        fields["lengths"] = fields["lengths"]["changes"]
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Meta:
        """Read it back; of an older format as far as it goes, with its own `format`.

        Raises:
            PartitionHalted: a newer version of Meterline wrote it.
        """
        fields = json.loads(data)
        # Before anything else is looked at: of what a newer version added nothing is known here.
        if fields["format"] > FORMAT_VERSION or fields["rules"] > RULE_VERSION:
            raise PartitionHalted(
                f"its state was written by a newer version, with format {fields['format']} and rules "
                f"{fields['rules']}; this one knows formats up to {FORMAT_VERSION} and rules up to "
                f"{RULE_VERSION}, and leaves the partition as it is. Run the newer version here, too"
            )
        if "window_length_ms" in fields:  # formats 1 and 2
            fields["lengths"] = [asdict(WindowLengths.of(fields.pop("window_length_ms")).newest)]
        return cls(
            **{
                **fields,
                "counters": Counters(**fields["counters"]),
                "lengths": WindowLengths(tuple(LengthChange(**change) for change in fields["lengths"])),
                "older_rules": tuple((until, rules) for until, rules in fields.get("older_rules", ())),
            }
        )

    def brought_up_to_date(self, log_end: int) -> Meta:
        """The same with the format and the rules of this version.

        Args:
            log_end: of its partition. What is below may have been decided, and inserted, by the older rules,
                in a flush that was not committed: they hold up to there.
        """
        older_rules = self.older_rules
        if self.rules < RULE_VERSION:
            open_ones = [older for older in older_rules if older[0] > self.applied_offset]
            older_rules = (*open_ones, (log_end - 1, self.rules))
        return replace(self, format=FORMAT_VERSION, rules=RULE_VERSION, older_rules=older_rules)

    def rules_at(self, offset: int) -> int:
        """Version of the rules that decide a record."""
        return next((rules for until, rules in self.older_rules if offset <= until), self.rules)


def meta_key(partition: int) -> bytes:
    """Key of the partition's one meta record."""
    return struct.pack(">Hc", partition, b"M")


def brake_key(partition: int) -> bytes:
    """Key of what the partition's brake on dead letters has counted."""
    return struct.pack(">Hc", partition, b"B")


def aggregate_key(partition: int, window_start: int, client_id: str, sku: str) -> bytes:
    """Key of one SKU's sums in one window of one client."""
    return aggregate_prefix(partition, window_start, client_id) + sku.encode()


def aggregate_prefix(partition: int, window_start: int, client_id: str) -> bytes:
    """What the keys of all SKUs of one window of one client begin with."""
    client = client_id.encode()
    return _HEAD.pack(partition, b"A", window_start, len(client)) + client


def parse_aggregate_key(key: bytes) -> tuple[int, str, str]:
    """Window start, client, SKU. Both texts interned: they stand in many keys."""
    _, _, window_start, length = _HEAD.unpack_from(key)
    split = _HEAD.size + length
    return window_start, intern(key[_HEAD.size : split].decode()), intern(key[split:].decode())


def aggregate_value(total: SkuTotal) -> bytes:
    """Four signed 64-bit integers."""
    return _AGGREGATE.pack(total.count, total.credits_micro, total.free_count, total.free_credits_micro)


def parse_aggregate_value(value: bytes) -> SkuTotal:
    """Inverse of aggregate_value."""
    return SkuTotal(*_AGGREGATE.unpack(value))


def window_key(partition: int, window_start: int, client_id: str) -> bytes:
    """Key of a window's publication state."""
    client = client_id.encode()
    return _HEAD.pack(partition, b"W", window_start, len(client)) + client


def parse_window_key(key: bytes) -> tuple[int, str]:
    """Window start, client (interned)."""
    _, _, window_start, _ = _HEAD.unpack_from(key)
    return window_start, intern(key[_HEAD.size :].decode())


def total_key(partition: int, client_id: str) -> bytes:
    """Key of all that one client has ever used."""
    return _TOTAL_HEAD.pack(partition, b"T") + client_id.encode()


def parse_total_key(key: bytes) -> str:
    """Client (interned)."""
    return intern(key[_TOTAL_HEAD.size :].decode())


def total_value(sums: SkuTotal, last_offset: int) -> bytes:
    """Five signed 64-bit integers: the sums, and the offset of the client's newest event."""
    return aggregate_value(sums) + _OFFSET.pack(last_offset)


def parse_total_value(value: bytes) -> tuple[SkuTotal, int]:
    """Inverse of total_value."""
    return parse_aggregate_value(value[: _AGGREGATE.size]), _OFFSET.unpack_from(value, _AGGREGATE.size)[0]


def published_value(cutoff_offset: int, last_offset: int) -> bytes:
    """Cutoff of the newest snapshot (-1: none yet) and offset of the newest event of the window."""
    return _PUBLISHED.pack(cutoff_offset, last_offset)


def parse_published_value(value: bytes) -> tuple[int, int]:
    """Inverse of published_value."""
    cutoff_offset, last_offset = _PUBLISHED.unpack(value)
    return cutoff_offset, last_offset
