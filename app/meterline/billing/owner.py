"""The owner of one partition of usage.windows: one commit per flush, Stripe only after it.

snapshots -> verify -> advances + intents + attempts -> commit -> ledger -> Stripe
                               answers of earlier attempts -^
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import stamina

from meterline.billing.intake import Arrived, Clients, Intake, Reader
from meterline.billing.meters import MeterMap
from meterline.billing.outbound import Outbound, Sender
from meterline.billing.rows import log_columns, snapshot_columns
from meterline.billing.send import boot_time
from meterline.billing.state import BillingState, Meta
from meterline.billing.valuation import Valuation
from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import snapshot_from_record
from meterline.domain.windows import WindowSnapshot
from meterline.errors import DeadLetterError, PartitionHalted, RetryLater
from meterline.ledger.tables import (
    USAGE_RECORD_LOG,
    USAGE_RECORD_LOG_COLUMNS,
    WINDOW_SNAPSHOT_COLUMNS,
    WINDOW_SNAPSHOTS,
)
from meterline.logs import get_logger
from meterline.metrics import USAGE_RECORDS_HELD
from meterline.settings import BillingSettings
from meterline.streaming.owner import Commit, CommitFn, LogRange, PartitionOwner, SourceRecord
from meterline.streaming.steps import Step, reached

__all__ = ["BillingOwner", "BillingParts", "Writer"]

WINDOWS_PER_COMMIT_MAX = 5_000
"""About six changelog records each: a transaction of a few megabytes, far below its time-out."""
HELD_METRIC_INTERVAL_MS = 10_000
"""Counting what is held walks over it: not at every flush."""

log = get_logger(__name__)


class Writer(Protocol):
    """What is needed of the ledger's writer."""

    async def insert(self, table: str, columns: Sequence[str], data: Sequence[Sequence[Any]]) -> None:
        """Returns when the rows are acknowledged."""


@dataclass(frozen=True, slots=True)
class BillingParts:
    """What the partitions of a worker share."""

    settings: BillingSettings
    codec: RecordCodec
    meters: MeterMap
    clients: Clients
    reader: Reader
    writer: Writer
    sender: Sender
    clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000


class BillingOwner(PartitionOwner):
    """Bills the windows of one partition."""

    def __init__(self, partition: int, parts: BillingParts) -> None:
        self._partition = partition
        self._parts = parts
        self._arrived: deque[SourceRecord] = deque()
        self._held: Counter[str] = Counter()
        self._count_held_at = 0
        self._in_ledger: list[int] = []
        self._log: LogRange
        self._commit: CommitFn
        self._state: BillingState
        self._intake: Intake
        self._outbound: Outbound

    # -- taking over

    async def restore(self, state: Mapping[bytes, bytes], log: LogRange, commit: CommitFn) -> int:
        """Go on where the last committed state stands; see PartitionOwner."""
        parts = self._parts
        self._log, self._commit = log, commit
        committed = BillingState.decode(self._partition, state)
        meta = self._checked(committed.meta if committed else None, log)
        in_ledger = await parts.reader.next_seq(log.topic_id, log.partition)
        if in_ledger > meta.next_seq:
            raise PartitionHalted(
                f"the ledger has {in_ledger} steps of billing for {log.topic}-{log.partition}, its changelog "
                f"accounts for {meta.next_seq}: the changelog lost state. Restore it; a fresh start would "
                "bill these windows again"
            )
        self._state = committed or BillingState(self._partition, meta)
        self._check_meters()
        if committed is None or meta != committed.meta:
            self._state.set_meta(meta)
            await commit(Commit(self._state.take_changes(), (), meta.applied_offset))
        valuation = Valuation(self._state, parts.meters, parts.settings.installation_id)
        self._intake = Intake(
            self._state,
            valuation,
            clients=parts.clients,
            reader=parts.reader,
            settings=parts.settings,
            decode=self._decode_bytes,
        )
        self._outbound = Outbound(self._state, parts.clients, parts.sender, parts.clock_ms)
        await self._append_rows()
        return meta.applied_offset + 1

    def _checked(self, meta: Meta | None, log: LogRange) -> Meta:
        """The META to go on with.

        Raises:
            PartitionHalted: going on would skip windows, or bill them under another name.
        """
        where = f"{log.topic}-{log.partition}"
        meters, installation = self._parts.meters, self._parts.settings.installation_id
        now = Meta(log.topic_id, installation, meters.version, meters.digest)
        if meta is None:
            meta = now
        if meta.topic_id != log.topic_id:
            raise PartitionHalted(
                f"{where} was recreated: its topic id is {log.topic_id}, billing stands at offset "
                f"{meta.applied_offset} of {meta.topic_id}"
            )
        if not log.start_offset <= meta.applied_offset + 1 <= log.end_offset:
            raise PartitionHalted(
                f"{where} holds offsets {log.start_offset} to {log.end_offset - 1}, billing needs "
                f"{meta.applied_offset + 1} next: windows in between would never be billed"
            )
        if meta.installation_id != installation:
            raise PartitionHalted(
                f"{where} was billed as installation {meta.installation_id!r}, the settings say "
                f"{installation!r}: usage records would get other identifiers. Set "
                f"METERLINE_BILLING__INSTALLATION_ID={meta.installation_id}"
            )
        if meters.version < meta.map_version or (
            meters.version == meta.map_version and meters.digest != meta.map_digest
        ):
            raise PartitionHalted(
                f"{where} was billed under version {meta.map_version} of the meters file; this file says "
                f"version {meters.version} with other content. Give a changed file a higher version"
            )
        return replace(meta, map_version=meters.version, map_digest=meters.digest)

    def _check_meters(self) -> None:
        used = {key.meter for key in self._state.accounts}
        if gone := sorted(used - self._parts.meters.by_name.keys()):
            raise PartitionHalted(
                f"the meters file no longer has {', '.join(gone)}, which was billed. Put it back; its `skus` "
                "may be empty"
            )

    # -- records

    def feed(self, records: Iterable[SourceRecord]) -> None:
        """Take records in; they are decoded by the next flush, because a registry may have to be asked."""
        self._arrived.extend(records)

    @property
    def pending(self) -> int:
        """Records taken in and not committed."""
        return len(self._arrived)

    async def flush(self) -> None:
        """Commit everything that arrived, and the answers and attempts of the moment."""
        await self._flush_batch()
        while self._arrived:
            await self._flush_batch()

    async def _flush_batch(self) -> None:
        state, parts = self._state, self._parts
        batch = [self._arrived[i] for i in range(min(len(self._arrived), WINDOWS_PER_COMMIT_MAX))]
        arrived = await self._decode(batch)
        if arrived:
            snapshots = [(r.offset, one.snapshot) for r, one in zip(batch, arrived, strict=True)]
            columns = snapshot_columns(self._log.topic_id, self._partition, snapshots)
            await parts.writer.insert(WINDOW_SNAPSHOTS, WINDOW_SNAPSHOT_COLUMNS, columns)
        self._outbound.settle()
        valued = await self._intake.take(arrived, parts.clock_ms())
        for record in valued.records:
            self._outbound.push(record)
        attempts = self._outbound.plan()
        state.drop_rows(self._in_ledger)
        self._in_ledger = []
        if batch:
            state.set_meta(replace(state.meta, applied_offset=batch[-1].offset))
        reached(Step.FLUSH_BUILT)
        committed_at = boot_time()
        if changes := state.take_changes():
            await self._commit(Commit(changes, (), state.meta.applied_offset))
        for _ in batch:
            self._arrived.popleft()
        await self._append_rows()
        if valued.records:
            reached(Step.INTENT_IN_LEDGER)
        if attempts:
            reached(Step.ATTEMPT_IN_LEDGER)
            self._outbound.start(attempts, committed_at)
        if valued.windows:
            log.info(
                "windows billed",
                partition=self._partition,
                windows=valued.windows,
                usage_records=len(valued.records),
                waiting=len(state.waiting),
                up_to_offset=state.meta.applied_offset,
            )
        self._show_held()

    async def _append_rows(self) -> None:
        """Bring the outbox into the ledger. A restart appends what it finds again: same seq, same row."""
        rows = dict(self._state.outbox)
        if rows:
            columns = log_columns(self._log.topic_id, self._partition, rows)
            await self._parts.writer.insert(USAGE_RECORD_LOG, USAGE_RECORD_LOG_COLUMNS, columns)
            self._in_ledger = list(rows)

    # -- decoding

    async def _decode(self, batch: Sequence[SourceRecord]) -> list[Arrived]:
        """In a thread: the codec may ask a schema registry, until it answers."""
        if not batch:
            return []
        async for attempt in stamina.retry_context(on=RetryLater, attempts=None, timeout=None, wait_max=5.0):
            with attempt:
                return await asyncio.to_thread(lambda: [self._decode_record(record) for record in batch])
        raise AssertionError("retries without a limit don't end")

    def _decode_record(self, record: SourceRecord) -> Arrived:
        value = record.value or b""
        try:
            return Arrived(self._decode_bytes(value), value)
        except DeadLetterError as error:
            raise PartitionHalted(
                f"{self._log.topic}-{self._partition} offset {record.offset} is no window of ours: {error}"
            ) from error

    def _decode_bytes(self, value: bytes) -> WindowSnapshot:
        return snapshot_from_record(self._parts.codec.decode(value))

    # -- the rest

    def _show_held(self) -> None:
        now_ms = self._parts.clock_ms()
        if now_ms < self._count_held_at:
            return
        self._count_held_at = now_ms + HELD_METRIC_INTERVAL_MS
        self._set_held(
            Counter(waiting.reason for waiting in self._state.waiting.values() if waiting.reason)
            + Counter(record.held_reason for record in self._state.records.values() if record.held_reason)
        )

    def _set_held(self, held: Counter[str]) -> None:
        """The metric is of the whole worker: add this partition's difference."""
        for reason in held.keys() | self._held.keys():
            USAGE_RECORDS_HELD.labels(reason).inc(held[reason] - self._held[reason])
        self._held = held

    def close(self) -> None:
        """The partition is lost; see PartitionOwner."""
        if hasattr(self, "_outbound"):  # not after a restore that halted
            self._outbound.close()
        self._set_held(Counter())
