"""What billing knows of one partition, and how it stands in the changelog.

Keys are one letter, the partition, and an id; values are JSON arrays (field order is part of the format).

    M            Meta            where we are, and under which map and installation
    W window     Known           the last valued snapshot
    A account    Account         C and U of a client, meter, map version and period
    R record     UsageRecord     a usage record without a final outcome
    H window     Waiting         a snapshot that can't be valued yet, with its original bytes
    O seq        row             a row for the ledger that ClickHouse has not acknowledged
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

from meterline.domain.billing import Account, AccountKey, Known
from meterline.domain.encoding import hash_hex
from meterline.domain.usage_records import RecordState, UsageRecord
from meterline.errors import PartitionHalted

__all__ = ["FORMAT_VERSION", "BillingState", "Meta", "Row", "Waiting"]

FORMAT_VERSION = 1
"""Raised with every change of the encodings below; a newer one than ours is not read."""

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
    """

    topic_id: str
    installation_id: str
    map_version: int
    map_digest: str
    applied_offset: int = -1
    next_seq: int = 0
    format_version: int = FORMAT_VERSION


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


_META, _KEY, _ACCOUNT, _RECORD = map(_values_of, (Meta, AccountKey, Account, UsageRecord))


@dataclass(slots=True)
class BillingState:
    """One partition's state in memory, and the changes since the last commit."""

    partition: int
    meta: Meta
    windows: dict[str, Known] = field(default_factory=dict)
    accounts: dict[AccountKey, Account] = field(default_factory=dict)
    records: dict[str, UsageRecord] = field(default_factory=dict)
    waiting: dict[str, Waiting] = field(default_factory=dict)
    outbox: dict[int, Row] = field(default_factory=dict)
    _changed: dict[bytes, bytes | None] = field(default_factory=dict)

    # -- changes, each also noted for the next commit

    def set_window(self, window_id: str, known: Known) -> None:
        """Remember a valued snapshot."""
        self.windows[window_id] = known
        self._changed[self._window_key(b"W", window_id)] = _json(
            known.cutoff_offset, known.amounts, dict(known.meters)
        )

    def set_account(self, key: AccountKey, account: Account) -> None:
        """Move an account."""
        self.accounts[key] = account
        name = hash_hex("meterline.account.1", *_KEY(key))
        self._changed[self._window_key(b"A", name)] = _json(*_KEY(key), *_ACCOUNT(account))

    def set_record(self, record: UsageRecord) -> None:
        """Write a usage record down, or move it on."""
        self.records[record.identifier] = record
        self._changed[self._key(b"R", record.identifier.encode())] = _json(*_RECORD(record))

    def drop_record(self, identifier: str) -> None:
        """A record has its final outcome; it stands in the ledger from now on."""
        del self.records[identifier]
        self._changed[self._key(b"R", identifier.encode())] = None

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
        meta = Meta(*json.loads(meta_value))
        if meta.format_version != FORMAT_VERSION:
            raise PartitionHalted(
                f"billing state of partition {partition} has format {meta.format_version}; this version "
                f"reads {FORMAT_VERSION}: run the version that wrote it"
            )
        state = cls(partition, meta)
        for key, value in changelog.items():
            state._load(key[:1], key[5:], value)
        return state

    def _load(self, kind: bytes, name: bytes, value: bytes) -> None:
        match kind:
            case b"W":
                self.windows[name.hex()] = Known(*json.loads(value))
            case b"A":
                *key, credits_micro, units = json.loads(value)
                self.accounts[AccountKey(*key)] = Account(credits_micro, units)
            case b"R":
                record = UsageRecord(*json.loads(value))
                self.records[record.identifier] = replace(record, state=RecordState(record.state))
            case b"H":
                header, _, packed = value.partition(b"\n")
                reason, since, credits_micro = json.loads(header)
                self.waiting[name.hex()] = Waiting(zlib.decompress(packed), reason, since, credits_micro)
            case b"O":
                self.outbox[int.from_bytes(name, "big")] = tuple(json.loads(value))
            case b"M":
                pass
            case _:
                raise PartitionHalted(f"the billing changelog has a key of unknown kind {kind!r}")


def _json(*fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
