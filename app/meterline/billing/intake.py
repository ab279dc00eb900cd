"""From snapshots that arrived to accounts that moved: what is new, what is verified, what must wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from meterline.billing.meters import UnmappedSkuError
from meterline.billing.rows import window_row
from meterline.billing.state import BillingState, Row, Waiting
from meterline.billing.switches import Clients
from meterline.billing.valuation import Valuation
from meterline.domain.billing import Known, Verdict, amounts_digest, judge
from meterline.domain.clients import Client
from meterline.domain.usage_records import UsageRecord
from meterline.domain.windows import WindowSnapshot
from meterline.logs import get_logger
from meterline.metrics import WINDOWS_CONTRADICTED
from meterline.settings import BillingSettings

__all__ = ["Arrived", "HeldReason", "Intake", "Reader", "Valued"]

REVIEWS_PER_FLUSH_MAX = 5_000
"""Waiting windows looked at again in one flush: with their rows one transaction of a few megabytes."""

log = get_logger(__name__)


class HeldReason:
    """Why a window waits. The words are stored in the ledger."""

    NO_CUSTOMER = "no_customer"
    UNMAPPED_SKU = "unmapped_sku"
    UNVERIFIED = "unverified"
    STILL_TRYING = ""
    """Not equal to the ledger yet, and not for long: not listed as held."""


class Reader(Protocol):
    """What billing asks the ledger."""

    async def verified(self, snapshots: Sequence[WindowSnapshot]) -> list[bool]:
        """Whether each snapshot equals the sum of its rows."""

    async def next_seq(self, log_id: str, partition: int) -> int:
        """One more than the newest step."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A snapshot as it was read: decoded, and the bytes it came in."""

    snapshot: WindowSnapshot
    record: bytes


@dataclass(frozen=True, slots=True)
class Valued:
    """What one batch came to."""

    windows: int
    records: Sequence[UsageRecord]


class Intake:
    """Takes in the snapshots of one partition. Changes the state; the caller commits."""

    def __init__(
        self,
        state: BillingState,
        valuation: Valuation,
        *,
        clients: Clients,
        reader: Reader,
        settings: BillingSettings,
        decode: Callable[[bytes], WindowSnapshot],
    ) -> None:
        self._state = state
        self._valuation = valuation
        self._clients = clients
        self._reader = reader
        self._settings = settings
        self._waiting = {
            window_id: Arrived(decode(waiting.record), waiting.record)
            for window_id, waiting in state.waiting.items()
        }
        self._tries: dict[str, int] = {}
        self._to_review: deque[str] = deque(self._waiting)
        self._review_at = 0
        self._clients_version = clients.version

    async def take(self, arrived: Sequence[Arrived], now_ms: int) -> Valued:
        """Value what is new and verified; let the rest wait."""
        candidates = self._newest(arrived)
        for window_id in self._due(now_ms):
            candidates.setdefault(window_id, self._waiting[window_id])
        sound: list[tuple[str, Arrived, Client]] = []
        for window_id, candidate in candidates.items():
            client = self._clients.get(candidate.snapshot.ref.client_id)
            if client is None or not (client.test or client.stripe_customer_id):
                self._hold(window_id, candidate, HeldReason.NO_CUSTOMER, now_ms)
            else:
                sound.append((window_id, candidate, client))
        verified = await self._reader.verified([candidate.snapshot for _, candidate, _ in sound])
        windows, records = 0, list[UsageRecord]()
        for (window_id, candidate, client), equal in zip(sound, verified, strict=True):
            if not equal:
                self._try_again(window_id, candidate, now_ms)
                continue
            try:
                records += self._valuation.value(candidate.snapshot, client, now_ms)
            except UnmappedSkuError:
                self._hold(window_id, candidate, HeldReason.UNMAPPED_SKU, now_ms)
                continue
            windows += 1
            self._release(window_id, now_ms)
        return Valued(windows, records)

    def _newest(self, arrived: Sequence[Arrived]) -> dict[str, Arrived]:
        """For each window the newest snapshot that says more than what is known or waits."""
        candidates: dict[str, Arrived] = {}
        for one in arrived:
            window_id = one.snapshot.ref.window_id
            rival = candidates.get(window_id) or self._waiting.get(window_id)
            known = self._state.windows.get(window_id)
            if rival is not None:
                known = Known(rival.snapshot.cutoff_offset, amounts_digest(rival.snapshot.skus))
            verdict = judge(known, one.snapshot.cutoff_offset, amounts_digest(one.snapshot.skus))
            if verdict is Verdict.NEWER:
                candidates[window_id] = one
            elif verdict is Verdict.CONTRADICTED:
                WINDOWS_CONTRADICTED.inc()
                log.error(
                    "two snapshots of one cutoff differ; the first stands",
                    window_id=window_id,
                    client_id=one.snapshot.ref.client_id,
                    cutoff_offset=one.snapshot.cutoff_offset,
                    remedy="compare both in the ledger's window_snapshots: one is not what the log says",
                )
        return candidates

    def _due(self, now_ms: int) -> list[str]:
        """Waiting windows to look at now: those still being tried each time, the others at intervals."""
        if now_ms >= self._review_at or self._clients.version != self._clients_version:
            self._review_at = now_ms + self._settings.held_recheck_interval_ms
            self._clients_version = self._clients.version
            self._to_review = deque(self._waiting)
        due = [window_id for window_id in self._tries if window_id in self._waiting]
        while self._to_review and len(due) < REVIEWS_PER_FLUSH_MAX:
            window_id = self._to_review.popleft()
            if window_id in self._waiting and window_id not in self._tries:
                due.append(window_id)
        return due

    def _try_again(self, window_id: str, candidate: Arrived, now_ms: int) -> None:
        """Not equal to the ledger: a few more tries in silence, then held. A newer snapshot starts anew."""
        before = self._waiting.get(window_id)
        if before is not None and before.record == candidate.record:
            if self._state.waiting[window_id].reason == HeldReason.UNVERIFIED:
                return
            tries = self._tries.get(window_id, 0) + 1
        else:
            tries = 0
        if tries >= self._settings.verify_retries:
            self._tries.pop(window_id, None)
            self._hold(window_id, candidate, HeldReason.UNVERIFIED, now_ms)
        else:
            self._hold(window_id, candidate, HeldReason.STILL_TRYING, now_ms)
            self._tries[window_id] = tries

    def _hold(self, window_id: str, candidate: Arrived, reason: str, now_ms: int) -> None:
        before = self._state.waiting.get(window_id)
        known = self._state.windows.get(window_id)
        missing = candidate.snapshot.billable_credits_micro - sum(known.meters.values() if known else ())
        if reason != HeldReason.STILL_TRYING:
            self._tries.pop(window_id, None)
        if before is not None and before.record == candidate.record and before.reason == reason:
            return
        since = before.since if before is not None and before.reason == reason else now_ms
        self._state.set_waiting(window_id, Waiting(candidate.record, reason, since, missing))
        self._waiting[window_id] = candidate
        if reason:
            self._state.add_row(self._row("held", candidate, missing, reason, now_ms))
            log.warning(
                "window held",
                client_id=candidate.snapshot.ref.client_id,
                window_id=window_id,
                cutoff_offset=candidate.snapshot.cutoff_offset,
                reason=reason,
            )
        elif before is not None and before.reason:
            self._state.add_row(self._row("released", candidate, 0, before.reason, now_ms))

    def _release(self, window_id: str, now_ms: int) -> None:
        """A window that waited, or an older snapshot of it, is valued now."""
        waiting = self._state.waiting.get(window_id)
        if waiting is None:
            return
        candidate = self._waiting.pop(window_id)
        self._tries.pop(window_id, None)
        self._state.drop_waiting(window_id)
        if waiting.reason:
            row = self._row("released", candidate, waiting.credits_micro, waiting.reason, now_ms)
            self._state.add_row(row)

    @staticmethod
    def _row(kind: str, candidate: Arrived, credits_micro: int, reason: str, now_ms: int) -> Row:
        snapshot = candidate.snapshot
        return window_row(
            kind, now_ms, snapshot.ref, snapshot.cutoff_offset, credits_micro=credits_micro, reason=reason
        )
