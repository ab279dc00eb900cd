"""Stripe's notices of rejections: joined to their record by the idempotency key of its request.

A notice names samples only, and moves nothing by itself: the day of its record becomes suspect, and is
compared with Stripe's summary. What no sample names is found by that comparison, too, a day later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from meterline.billing.clock import Clock
from meterline.billing.state import BillingState
from meterline.billing.stripe_reads import Notice, Reads
from meterline.domain.account_books import About, AccountBooks
from meterline.domain.accounts import AccountKey
from meterline.errors import RetryLater
from meterline.logs import get_logger

__all__ = ["NoticeBoard", "Notices", "RecordFinder", "Told"]

POLL_INTERVAL_MS = 600_000
"""4,400 reads a month and worker; a suspect day waits for hours anyway."""
OVERLAP_S = 1_800
"""A notice may be listed later than one that was created after it."""
FIRST_POLL_S = 86_400
"""How far back a partition looks that never looked."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Told:
    """A record that left the state, as the ledger has it."""

    account: AccountKey
    day: int
    about: About


class RecordFinder(Protocol):
    """What is asked of the ledger."""

    async def told(self, log_id: str, partition: int, identifiers: Sequence[str]) -> Mapping[str, Told]:
        """Those of the identifiers that this partition wrote down."""


class NoticeBoard:
    """Asks Stripe once for all partitions of a worker."""

    def __init__(self, reads: Reads, clock: Clock) -> None:
        self._reads = reads
        self._clock = clock
        self._turn = asyncio.Lock()
        self._since_s = 0
        self._asked_at = 0
        self._notices: Sequence[Notice] = ()

    async def since(self, since_s: int) -> tuple[Sequence[Notice], int]:
        """Notices created at or after a moment, and the moment (seconds) up to which they are complete.

        Raises:
            RetryLater: Stripe doesn't answer.
        """
        async with self._turn:
            now_ms = self._clock.now_ms()
            if now_ms - self._asked_at >= POLL_INTERVAL_MS or since_s < self._since_s:
                self._notices = await self._reads.notices(since_s)
                self._since_s, self._asked_at = since_s, now_ms
            return [one for one in self._notices if one.created_s >= since_s], self._asked_at // 1000


class Notices:
    """Takes in the notices about one partition's records."""

    def __init__(
        self,
        state: BillingState,
        books: AccountBooks,
        *,
        board: NoticeBoard,
        finder: RecordFinder,
        clock: Clock,
    ) -> None:
        self._state = state
        self._books = books
        self._board = board
        self._finder = finder
        self._clock = clock
        self._poll_at = 0
        self._taken: dict[tuple[str, int], None] = {}
        """Notices of the overlap that were taken in already."""
        self._asking: asyncio.Task[None] | None = None
        self._found: tuple[list[tuple[Notice, str, Told]], int] | None = None
        self._broken: BaseException | None = None

    def start(self) -> None:
        """Ask, if it is time."""
        now_ms = self._clock.now_ms()
        if now_ms < self._poll_at or self._asking is not None:
            return
        self._poll_at = now_ms + POLL_INTERVAL_MS
        up_to = self._state.meta.notices_up_to or now_ms // 1000 - FIRST_POLL_S
        self._asking = asyncio.create_task(self._ask(up_to - OVERLAP_S))

    def settle(self) -> None:
        """Put what was found into the state."""
        if self._broken is not None:
            raise self._broken
        if self._found is None:
            return
        (found, up_to), self._found = self._found, None
        now_ms = self._clock.now_ms()
        for notice, identifier, told in found:
            self._taken[identifier, notice.created_s] = None
            self._books.notice(
                told.account, told.day, told.about, now_ms, detail=f"{identifier}: {notice.why}"
            )
            log.error("Stripe rejected a usage record it had accepted", identifier=identifier, why=notice.why)
        oldest = up_to - OVERLAP_S
        self._taken = {key: None for key in self._taken if key[1] >= oldest}
        self._state.set_meta(replace(self._state.meta, notices_up_to=up_to))

    def close(self) -> None:
        """The partition is lost."""
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self, since_s: int) -> None:
        try:
            notices, up_to = await self._board.since(since_s)
            names = {notice: notice.idempotency_key.rpartition(":")[0] for notice in notices}
            new = [one for one in notices if (names[one], one.created_s) not in self._taken]
            told = await self._told({names[one] for one in new})
            found = [(one, names[one], told[names[one]]) for one in new if names[one] in told]
            self._found = found, up_to
        except RetryLater as error:
            log.warning("Stripe could not be asked for notices", error=str(error))
        except Exception as error:  # noqa: BLE001 - raised again by the next flush, which ends the process
            self._broken = error
        finally:
            self._asking = None

    async def _told(self, identifiers: set[str]) -> dict[str, Told]:
        """Open records from the state, the others from the ledger; foreign ones from nowhere."""
        told = {
            name: Told(record.account, record.day, About.record(record))
            for name in identifiers
            if (record := self._state.open_record(name)) is not None
        }
        if left := sorted(identifiers - told.keys()):
            meta, partition = self._state.meta, self._state.partition
            told |= await self._finder.told(meta.topic_id, partition, left)
        return told
