"""What billing knows of one partition, and how it stands in the changelog.

Keys are one letter, the partition, and an id; values are JSON arrays (field order is part of the format).

    M            Meta            where we are, and under which map and installation
    W window     Known           the last valued snapshot
    T meter      MeterTerms      a meter that was ever used: its name at Stripe and its unit stay
    I meter      id              Stripe's own id of a meter: another one is another account
    A account    Account         C and U of a client, meter, period and customer
    D account+day Day            what Stripe is believed to hold of an account on one UTC day
    R record     UsageRecord     a usage record without a final outcome
    H window     Waiting         a snapshot that can't be valued yet, with its original bytes
    O seq        row             a row for the ledger that ClickHouse has not acknowledged
    X order      moment          an order of a person that was carried out
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

from meterline.billing.rows import step_row
from meterline.domain.account_books import MeterTerms, Step
from meterline.domain.accounts import Account, AccountKey, Day
from meterline.domain.billing import Known
from meterline.domain.usage_records import RecordState, UsageRecord
from meterline.errors import PartitionHalted

__all__ = ["FORMAT_VERSION", "BillingState", "Meta", "Row", "Waiting"]

FORMAT_VERSION = 3
"""Raised with every change of the encodings below; a newer one than ours is not read, an older one is brought
up to date by `formats`."""

Row = tuple[Any, ...]
"""One row of usage_record_log, without where it stands; `rows` builds them."""


def _values_of(kind: type) -> Callable[[Any], tuple[Any, ...]]:
    """All fields of a flat dataclass, in order; `astuple` copies each and is ten times slower."""
    return attrgetter(*(f.name for f in fields(kind)))


@dataclass(frozen=True, slots=True)
class Meta:
    """Where a partition stands.

    Attributes:
        topic_id: of usage.windows; another one under the same name is another log.
        applied_offset: every record up to this one is part of the state; -1 before the first.
        next_seq: number of the next row of usage_record_log.
        map_digest: of the meters file under `map_version`.
        notices_up_to: Stripe's notices created up to this moment (seconds) were taken in.
    """

    topic_id: str
    installation_id: str
    map_version: int
    map_digest: str
    applied_offset: int = -1
    next_seq: int = 0
    format_version: int = FORMAT_VERSION
    notices_up_to: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A snapshot that was read but can't be valued yet.

    Attributes:
        record: the record of usage.windows as it stood in the log.
        reason: why it waits; empty while verification is still being tried.
        since: when it began to wait, milliseconds.
        credits_micro: what it would add; listed as held.
    """

    record: bytes
    reason: str
    since: int
    credits_micro: int = 0


_META, _KEY, _ACCOUNT, _DAY, _RECORD = map(_values_of, (Meta, AccountKey, Account, Day, UsageRecord))
_KEY_FIELDS = len(fields(AccountKey))
_FORMAT_AT = [f.name for f in fields(Meta)].index("format_version")


@dataclass(slots=True)
class BillingState:
    """One partition's state in memory, and the changes since the last commit.

    It is the `Store` of `domain.account_books`.

    Attributes:
        unsure: days that Stripe's summary has not confirmed as they stand; derived from `days_of`.
        format_1_accounts: accounts of an older state, by their key, until `formats` has read them.
    """

    partition: int
    meta: Meta
    windows: dict[str, Known] = field(default_factory=dict)
    meters: dict[str, MeterTerms] = field(default_factory=dict)
    meter_ids: dict[str, str] = field(default_factory=dict)
    accounts: dict[AccountKey, Account] = field(default_factory=dict)
    days_of: dict[AccountKey, dict[int, Day]] = field(default_factory=dict)
    records: dict[str, UsageRecord] = field(default_factory=dict)
    waiting: dict[str, Waiting] = field(default_factory=dict)
    outbox: dict[int, Row] = field(default_factory=dict)
    orders: dict[str, int] = field(default_factory=dict)
    format_1_accounts: dict[bytes, list[Any]] = field(default_factory=dict)
    unsure: dict[AccountKey, set[int]] = field(default_factory=dict)
    _open: dict[AccountKey, dict[str, UsageRecord]] = field(default_factory=dict)
    _changed: dict[bytes, bytes | None] = field(default_factory=dict)

    # -- changes, each also noted for the next commit

    def set_window(self, window_id: str, known: Known) -> None:
        """Remember a valued snapshot."""
        self.windows[window_id] = known
        self._changed[self._window_key(b"W", window_id)] = _json(
            known.cutoff_offset, known.amounts, dict(known.meters)
        )

    def use_meter(self, name: str, terms: MeterTerms) -> None:
        """Remember what of a meter must never change, when it is first used."""
        if name not in self.meters:
            self.meters[name] = terms
            self._changed[self._key(b"T", name.encode())] = _json(terms.event_name, terms.unit_micro)

    def set_meter_id(self, name: str, meter_id: str) -> None:
        """Remember which of Stripe's meters a meter is."""
        if self.meter_ids.get(name) != meter_id:
            self.meter_ids[name] = meter_id
            self._changed[self._key(b"I", name.encode())] = _json(meter_id)

    def account(self, key: AccountKey) -> Account:
        """An account; one never set is empty."""
        return self.accounts.get(key, _EMPTY_ACCOUNT)

    def set_account(self, key: AccountKey, account: Account) -> None:
        """Move an account."""
        self.accounts[key] = account
        self._changed[self._window_key(b"A", key.name)] = _json(*_KEY(key), *_ACCOUNT(account))

    def drop_account(self, key: AccountKey) -> None:
        """A closed account that nothing can refer to any more."""
        del self.accounts[key]
        self._changed[self._window_key(b"A", key.name)] = None

    def days(self, key: AccountKey) -> Mapping[int, Day]:
        """The days of an account on which anything was told."""
        return self.days_of.get(key, {})

    def set_day(self, key: AccountKey, day: int, what: Day) -> None:
        """Move a day."""
        self._index_day(key, day, what)
        self._changed[self._day_key(key, day)] = _json(day, *_KEY(key), *_DAY(what))

    def drop_days(self, key: AccountKey) -> None:
        """An account was closed."""
        self.unsure.pop(key, None)
        for day in self.days_of.pop(key, {}):
            self._changed[self._day_key(key, day)] = None

    def _index_day(self, key: AccountKey, day: int, what: Day) -> None:
        self.days_of.setdefault(key, {})[day] = what
        if what.suspect or not what.confirmed:
            self.unsure.setdefault(key, set()).add(day)
        elif key in self.unsure:
            self.unsure[key].discard(day)
            if not self.unsure[key]:
                del self.unsure[key]

    def open_records(self, key: AccountKey) -> Collection[UsageRecord]:
        """An account's records without a final outcome."""
        return self._open.get(key, {}).values()

    def accounts_with_open_records(self) -> Collection[AccountKey]:
        """Accounts that are not all told yet."""
        return self._open.keys()

    def open_record(self, identifier: str) -> UsageRecord | None:
        """One of them."""
        return self.records.get(identifier)

    def set_record(self, record: UsageRecord) -> None:
        """Write a usage record down, or move it on."""
        self._index(record)
        self._changed[self._key(b"R", record.identifier.encode())] = _json(*_RECORD(record))

    def drop_record(self, identifier: str) -> None:
        """A record has its final outcome; it stands in the ledger from now on."""
        record = self.records.pop(identifier)
        left = self._open[record.account]
        del left[identifier]
        if not left:
            del self._open[record.account]
        self._changed[self._key(b"R", identifier.encode())] = None

    def _index(self, record: UsageRecord) -> None:
        former = self.records.get(record.identifier)
        if former is not None and former.account != record.account:
            raise ValueError(f"usage record {record.identifier} can't change its account")
        self.records[record.identifier] = record
        self._open.setdefault(record.account, {})[record.identifier] = record

    def add_step(self, step: Step, now_ms: int) -> None:
        """A row of the ledger about accounts and their records."""
        self.add_row(step_row(step, self.meta.map_version, now_ms))

    def set_order(self, order_id: str, ordered_at: int) -> None:
        """An order was carried out: never a second time."""
        self.orders[order_id] = ordered_at
        self._changed[self._key(b"X", order_id.encode())] = _json(ordered_at)

    def drop_order(self, order_id: str) -> None:
        """It is so old that nobody asks for it any more."""
        del self.orders[order_id]
        self._changed[self._key(b"X", order_id.encode())] = None

    def set_waiting(self, window_id: str, waiting: Waiting) -> None:
        """Let a snapshot wait; an older one of the window is superseded."""
        self.waiting[window_id] = waiting
        header = _json(waiting.reason, waiting.since, waiting.credits_micro)
        # Compressed, because a snapshot may be as large as a Kafka record can be, and this adds a header.
        self._changed[self._window_key(b"H", window_id)] = header + b"\n" + zlib.compress(waiting.record, 1)

    def drop_waiting(self, window_id: str) -> None:
        """A snapshot doesn't wait any more."""
        del self.waiting[window_id]
        self._changed[self._window_key(b"H", window_id)] = None

    def add_row(self, row: Sequence[Any]) -> int:
        """Number a row of usage_record_log and keep it until ClickHouse has acknowledged it."""
        seq = self.meta.next_seq
        self.meta = replace(self.meta, next_seq=seq + 1)
        self.outbox[seq] = tuple(row)
        self._changed[self._seq_key(seq)] = _json(*row)
        return seq

    def drop_rows(self, seqs: Iterable[int]) -> None:
        """These rows are in the ledger."""
        for seq in seqs:
            del self.outbox[seq]
            self._changed[self._seq_key(seq)] = None

    def set_meta(self, meta: Meta) -> None:
        """Move on. Every commit carries META anyway; this makes one due."""
        self.meta = meta
        self._changed[self._key(b"M")] = None  # written by take_changes, after all rows are numbered

    def take_changes(self) -> list[tuple[bytes, bytes | None]]:
        """Everything changed since the last call, for one commit; empty when nothing was."""
        if not self._changed:
            return []
        self._changed[self._key(b"M")] = _json(*_META(self.meta))
        changed, self._changed = self._changed, {}
        return list(changed.items())

    # -- keys: they carry the partition, because one table holds the keys of all partitions

    def _key(self, kind: bytes, name: bytes = b"") -> bytes:
        return kind + self.partition.to_bytes(4, "big") + name

    def _window_key(self, kind: bytes, window_id: str) -> bytes:
        return self._key(kind, bytes.fromhex(window_id))

    def _day_key(self, key: AccountKey, day: int) -> bytes:
        return self._window_key(b"D", key.name) + day.to_bytes(4, "big")

    def _seq_key(self, seq: int) -> bytes:
        return self._key(b"O", seq.to_bytes(8, "big"))

    @classmethod
    def decode(cls, partition: int, changelog: Mapping[bytes, bytes]) -> BillingState | None:
        """The committed state of a partition; None when it has none yet.

        Raises:
            PartitionHalted: it was written by a newer version, or there is state without its META.
        """
        meta_value = changelog.get(b"M" + partition.to_bytes(4, "big"))
        if meta_value is None:
            if changelog:
                raise PartitionHalted(
                    f"the billing changelog of partition {partition} has {len(changelog)} keys and no META"
                )
            return None
        values = json.loads(meta_value)
        # Before anything else is looked at: of what a newer version added nothing is known here.
        if not 1 <= (version := values[_FORMAT_AT]) <= FORMAT_VERSION:
            raise PartitionHalted(
                f"billing state of partition {partition} has format {version}; this version reads up to "
                f"{FORMAT_VERSION}, and leaves the partition as it is. Run the newer version here, too"
            )
        state = cls(partition, Meta(*values))
        for key, value in changelog.items():
            state._load(key[:1], key[5:], value)
        return state

    def _load(self, kind: bytes, name: bytes, value: bytes) -> None:  # noqa: PLR0912 - one for each kind
        match kind:
            case b"W":
                self.windows[name.hex()] = Known(*json.loads(value))
            case b"T":
                self.meters[name.decode()] = MeterTerms(*json.loads(value))
            case b"I":
                (self.meter_ids[name.decode()],) = json.loads(value)
            case b"A":
                values = json.loads(value)
                if self.meta.format_version == 1:
                    self.format_1_accounts[name] = values
                else:
                    key, rest = AccountKey(*values[:_KEY_FIELDS]), values[_KEY_FIELDS:]
                    self.accounts[key] = Account(*rest)
            case b"D":
                day, *values = json.loads(value)
                key, rest = AccountKey(*values[:_KEY_FIELDS]), values[_KEY_FIELDS:]
                self._index_day(key, day, Day(*rest))
            case b"R":
                record = UsageRecord(*json.loads(value))
                self._index(replace(record, state=RecordState(record.state)))
            case b"H":
                header, _, packed = value.partition(b"\n")
                reason, since, credits_micro = json.loads(header)
                self.waiting[name.hex()] = Waiting(zlib.decompress(packed), reason, since, credits_micro)
            case b"O":
                self.outbox[int.from_bytes(name, "big")] = tuple(json.loads(value))
            case b"X":
                (self.orders[name.decode()],) = json.loads(value)
            case b"M":
                pass
            case _:
                raise PartitionHalted(f"the billing changelog has a key of unknown kind {kind!r}")

    def drop_format_1(self, name: bytes) -> None:
        """An account of an older state was read; see `formats`."""
        del self.format_1_accounts[name]
        self._changed[self._key(b"A", name)] = None


_EMPTY_ACCOUNT = Account()


def _json(*fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
