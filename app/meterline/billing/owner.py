"""The owner of one partition of usage.windows: one commit per flush, Stripe only after it.

snapshots -> verify -> advances + intents + attempts -> commit -> ledger -> Stripe
      answers, summaries, invoices, notices, orders -^
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import stamina

from meterline.billing.clock import Clock
from meterline.billing.formats import bring_up_to_date
from meterline.billing.intake import Arrived, Intake
from meterline.billing.intake import Reader as WindowReader
from meterline.billing.meters import MeterMap
from meterline.billing.notices import NoticeBoard, Notices, RecordFinder
from meterline.billing.orders import OrderReader, Orders
from meterline.billing.outbound import Outbound, Sender
from meterline.billing.reconciler import Reconciler
from meterline.billing.rows import log_columns, snapshot_columns
from meterline.billing.state import BillingState, Meta
from meterline.billing.stripe_reads import Reads
from meterline.billing.switches import Clients, Switches
from meterline.billing.valuation import Valuation
from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import snapshot_from_record
from meterline.domain.account_books import AccountBooks, Terms
from meterline.domain.billing import invoice_closes_at
from meterline.domain.windows import WindowSnapshot
from meterline.errors import DeadLetterError, PartitionHalted, RetryLater
from meterline.ledger.tables import (
    USAGE_RECORD_LOG,
    USAGE_RECORD_LOG_COLUMNS,
    WINDOW_SNAPSHOT_COLUMNS,
    WINDOW_SNAPSHOTS,
)
from meterline.logs import get_logger
from meterline.metrics import INVOICE_CLOSES_SECONDS, USAGE_RECORDS_HELD
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


class Reader(WindowReader, RecordFinder, OrderReader, Protocol):
    """What billing asks the ledger."""


@dataclass(frozen=True, slots=True)
class BillingParts:
    """What the partitions of a worker share.

    Attributes:
        meter_ids: Stripe's own id of each meter of the meters file, by its name there.
    """

    settings: BillingSettings
    codec: RecordCodec
    meters: MeterMap
    meter_ids: Mapping[str, str]
    clients: Clients
    reader: Reader
    writer: Writer
    sender: Sender
    reads: Reads
    board: NoticeBoard
    switches: Switches
    clock: Clock


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
        self._reconciler: Reconciler
        self._notices: Notices
        self._orders: Orders

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
        bring_up_to_date(self._state, parts.meters.terms, self._customers())
        for name, meter_id in parts.meter_ids.items():
            self._state.set_meter_id(name, meter_id)
        if changes := self._state.take_changes():
            await commit(Commit(changes, (), meta.applied_offset))
        self._put_together()
        await self._orders.read_switches()
        await self._append_rows()
        return meta.applied_offset + 1

    def _put_together(self) -> None:
        parts, state = self._parts, self._state
        settings, clock = parts.settings, parts.clock
        terms = Terms(
            settings.installation_id, parts.meters.version, parts.meters.terms, settings.invoice_grace_ms
        )
        books = AccountBooks(state, terms)
        self._intake = Intake(
            state,
            Valuation(state, parts.meters, books),
            clients=parts.clients,
            reader=parts.reader,
            settings=settings,
            decode=self._decode_bytes,
        )
        self._outbound = Outbound(
            state,
            books,
            switches=parts.switches,
            sender=parts.sender,
            clock=clock,
            invoice_grace_ms=settings.invoice_grace_ms,
        )
        self._reconciler = Reconciler(
            state, books, clients=parts.clients, reads=parts.reads, clock=clock, meters=parts.meters.terms
        )
        self._notices = Notices(state, books, board=parts.board, finder=parts.reader, clock=clock)
        self._orders = Orders(
            state, books, self._reconciler, switches=parts.switches, reader=parts.reader, clock=clock
        )

    def _customers(self) -> dict[str, str]:
        """Customers of the clients in an older state."""
        names = {str(values[0]) for values in self._state.format_1_accounts.values()}
        known = {name: self._parts.clients.get(name) for name in names}
        return {
            name: client.stripe_customer_id
            for name, client in known.items()
            if client is not None and client.stripe_customer_id is not None
        }

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
        """A meter that was ever used stays as it is: what it counted would otherwise change its worth."""
        now = self._parts.meters.terms
        used = self._state.meters
        former = {values[1] for values in self._state.format_1_accounts.values()}
        if gone := sorted((used.keys() | former) - now.keys()):
            raise PartitionHalted(
                f"the meters file no longer has {', '.join(gone)}, which was billed. Put it back; its `skus` "
                "may be empty"
            )
        if changed := sorted(name for name, terms in used.items() if terms != now[name]):
            raise PartitionHalted(
                f"the meters file gives {', '.join(changed)} another event_name or unit than it was billed "
                "with. Put them back, and give a new unit a meter of its own"
            )
        ids = self._parts.meter_ids
        for name, known in self._state.meter_ids.items():
            if name in used and known != ids[name]:
                raise PartitionHalted(
                    f"meter {name} was billed as {known} at Stripe, the account of this key has {ids[name]} "
                    f"of event name {now[name].event_name!r}: another account, or one that was wiped, or a "
                    "meter made anew. What was told is not there. Set METERLINE_STRIPE__API_KEY (of a "
                    "sandbox, METERLINE_STRIPE__SANDBOX_URL) to the account that was billed, or reactivate "
                    "the meter. Another account needs an installation of its own"
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
        self._notices.settle()
        made = [*self._reconciler.settle(), *self._orders.carry_out()]
        valued = await self._intake.take(arrived, parts.clock.now_ms())
        for record in (*made, *valued.records):
            self._outbound.push(record)
        attempts = self._outbound.plan()
        state.drop_rows(self._in_ledger)
        self._in_ledger = []
        if batch:
            state.set_meta(replace(state.meta, applied_offset=batch[-1].offset))
        reached(Step.FLUSH_BUILT)
        committed_at = parts.clock.boot_s()
        if changes := state.take_changes():
            await self._commit(Commit(changes, (), state.meta.applied_offset))
        for _ in batch:
            self._arrived.popleft()
        await self._append_rows()
        if made or valued.records:
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
        self._reconciler.start()
        self._notices.start()
        self._orders.start()
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
        now_ms = self._parts.clock.now_ms()
        if now_ms < self._count_held_at:
            return
        self._count_held_at = now_ms + HELD_METRIC_INTERVAL_MS
        self._set_held(
            Counter(waiting.reason for waiting in self._state.waiting.values() if waiting.reason)
            + Counter(record.held_reason for record in self._state.records.values() if record.held_reason)
            + Counter(account.problem for account in self._state.accounts.values() if account.problem)
        )
        grace_ms = self._parts.settings.invoice_grace_ms
        closes = [
            invoice_closes_at(key.period_end, grace_ms) for key in self._state.accounts_with_open_records()
        ]
        left_s = (min(closes) - now_ms) / 1000 if closes else math.inf
        INVOICE_CLOSES_SECONDS.labels(self._partition).set(left_s)

    def _set_held(self, held: Counter[str]) -> None:
        """The metric is of the whole worker: add this partition's difference."""
        for reason in held.keys() | self._held.keys():
            USAGE_RECORDS_HELD.labels(reason).inc(held[reason] - self._held[reason])
        self._held = held

    def close(self) -> None:
        """The partition is lost; see PartitionOwner."""
        if hasattr(self, "_orders"):  # not after a restore that halted
            for part in (self._outbound, self._reconciler, self._notices, self._orders):
                part.close()
        self._set_held(Counter())
