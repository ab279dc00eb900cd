"""What persons order, carried out by the owner of the partition it is about, each order once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from meterline.billing.clock import Clock
from meterline.billing.reconciler import Reconciler
from meterline.billing.state import BillingState
from meterline.billing.switches import Switch, Switches
from meterline.domain.account_books import About, AccountBooks, Step
from meterline.domain.accounts import AccountKey
from meterline.domain.usage_records import UsageRecord
from meterline.ledger.billing_orders import BillingOrder
from meterline.logs import get_logger

__all__ = ["OrderReader", "Orders"]

POLL_INTERVAL_MS = 2_000
"""How soon a pause is noticed."""
VALID_MS = 7 * 86_400_000
"""An order that no worker saw for a week is not carried out any more: what it was about has changed."""

log = get_logger(__name__)


class OrderReader(Protocol):
    """What is asked of the ledger."""

    async def switches(self) -> Mapping[str, str]:
        """The newest order about sending, by client; '' for all."""

    async def orders_since(self, ordered_at: int) -> Sequence[BillingOrder]:
        """Orders about records and accounts, oldest first."""


class Orders:
    """Follows the orders for one partition."""

    def __init__(
        self,
        state: BillingState,
        books: AccountBooks,
        reconciler: Reconciler,
        *,
        switches: Switches,
        reader: OrderReader,
        clock: Clock,
    ) -> None:
        self._state = state
        self._books = books
        self._reconciler = reconciler
        self._switches = switches
        self._reader = reader
        self._clock = clock
        self._poll_at = 0
        self._asking: asyncio.Task[None] | None = None
        self._found: Sequence[BillingOrder] = ()
        self._broken: BaseException | None = None

    async def read_switches(self) -> None:
        """Before anything is sent: a pause outlives the worker that saw it."""
        ordered = await self._reader.switches()
        self._switches.set({client: Switch(action) for client, action in ordered.items()})

    def start(self) -> None:
        """Look for new orders, if it is time."""
        now_ms = self._clock.now_ms()
        if now_ms < self._poll_at or self._asking is not None:
            return
        self._poll_at = now_ms + POLL_INTERVAL_MS
        self._asking = asyncio.create_task(self._ask(now_ms - VALID_MS))

    def carry_out(self) -> list[UsageRecord]:
        """What was found and not yet done.

        Returns:
            Records to send.
        """
        if self._broken is not None:
            raise self._broken
        found, self._found = self._found, ()
        now_ms = self._clock.now_ms()
        for order_id in [name for name, at in self._state.orders.items() if at < now_ms - 2 * VALID_MS]:
            self._state.drop_order(order_id)
        to_send: list[UsageRecord] = []
        for order in found:
            if order.order_id not in self._state.orders:
                to_send += self._carry_out(order, now_ms)
        return to_send

    def close(self) -> None:
        """The partition is lost."""
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self, since: int) -> None:
        try:
            await self.read_switches()
            self._found = await self._reader.orders_since(since)
        except Exception as error:  # noqa: BLE001 - raised again by the next flush, which ends the process
            self._broken = error
        finally:
            self._asking = None

    def _carry_out(self, order: BillingOrder, now_ms: int) -> list[UsageRecord]:
        """Do what is ordered, if it is about this partition and can be done now; else look again later."""
        why = f"order {order.order_id}"
        made: UsageRecord | None = None
        if order.action == "resolve":
            key = next((key for key in self._state.accounts if key.name == order.target), None)
            if key is None or not self._books.may_close(key, now_ms):
                return []
            made = self._reconciler.resolve(key, order.value, now_ms, why)
        elif (record := self._state.open_record(order.target)) is not None:
            if record.held_reason != "refused":
                return []
            key = record.account
            made = self._books.release(record, now_ms, why=why)
        elif (found := self._foreign_day(order.target)) is not None:
            key, day = found
            self._books.not_foreign(key, day, now_ms, why)
        else:
            return []
        self._state.set_order(order.order_id, order.ordered_at)
        step = Step(
            "order", key, About.account(key), reason=order.action, detail=f"{why} by {order.ordered_by}"
        )
        self._state.add_step(step, now_ms)
        log.info("order carried out", action=order.action, client_id=key.client_id, target=order.target)
        return [made] if made is not None else []

    def _foreign_day(self, target: str) -> tuple[AccountKey, int] | None:
        for key, days in self._state.unsure.items():
            for day in days:
                if self._state.days(key)[day].foreign and About.day(key, day).window_id == target:
                    return key, day
        return None
