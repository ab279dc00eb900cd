"""The same words for plain threads: all threads' calls run on one event-loop thread, batched there."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from meterline.errors import UserError
from meterline.quota.answers import Balance, Credits, Outcome, Part, Reservation

__all__ = ["AsyncBuckets", "LoopThread", "SyncCreditBuckets"]

Result = TypeVar("Result")


class AsyncBuckets(Protocol):
    """What is asked on the loop: `CreditBuckets`, or the fake."""

    async def reserve(
        self,
        client_id: str,
        credits: Credits,  # noqa: A002 - the word everybody uses
        *,
        reservation_id: str,
        ttl_s: float = ...,
    ) -> Reservation:
        """See `CreditBuckets.reserve`."""

    async def settle(
        self, reservation_id: str, parts: Iterable[Part], *, final: bool = ..., client_id: str | None = ...
    ) -> None:
        """See `CreditBuckets.settle`."""

    async def void(self, reservation_id: str, *, client_id: str | None = ...) -> None:
        """See `CreditBuckets.void`."""

    async def renew(self, reservation_id: str, ttl_s: float = ..., *, client_id: str | None = ...) -> None:
        """See `CreditBuckets.renew`."""

    async def balance(self, client_id: str) -> Balance:
        """See `CreditBuckets.balance`."""

    async def reserve_many(
        self, client_id: str, wanted: Iterable[tuple[str, Credits]], ttl_s: float = ...
    ) -> list[Outcome]:
        """See `CreditBuckets.reserve_many`."""

    async def settle_many(
        self, client_id: str, settled: Iterable[tuple[str, Sequence[Part]]], *, final: bool = ...
    ) -> None:
        """See `CreditBuckets.settle_many`."""


class SyncCreditBuckets:
    """`CreditBuckets` without `await`; its methods say what these do. Any thread may call."""

    def __init__(self, buckets: AsyncBuckets, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        """Use `CreditBuckets.connect`.

        Args:
            buckets: what is asked.
            run: runs one call to its end and gives back what it gave.
        """
        self._buckets = buckets
        self._run = run

    def reserve(
        self,
        client_id: str,
        credits: Credits,  # noqa: A002 - the word everybody uses
        *,
        reservation_id: str,
        ttl_s: float = 60.0,
    ) -> Reservation:
        """See `CreditBuckets.reserve`."""
        made: Reservation = self._run(
            self._buckets.reserve(client_id, credits, reservation_id=reservation_id, ttl_s=ttl_s)
        )
        return made

    def settle(
        self, reservation_id: str, parts: Iterable[Part], *, final: bool = True, client_id: str | None = None
    ) -> None:
        """See `CreditBuckets.settle`."""
        self._run(self._buckets.settle(reservation_id, parts, final=final, client_id=client_id))

    def void(self, reservation_id: str, *, client_id: str | None = None) -> None:
        """See `CreditBuckets.void`."""
        self._run(self._buckets.void(reservation_id, client_id=client_id))

    def renew(self, reservation_id: str, ttl_s: float = 60.0, *, client_id: str | None = None) -> None:
        """See `CreditBuckets.renew`."""
        self._run(self._buckets.renew(reservation_id, ttl_s, client_id=client_id))

    def balance(self, client_id: str) -> Balance:
        """See `CreditBuckets.balance`."""
        found: Balance = self._run(self._buckets.balance(client_id))
        return found

    def reserve_many(
        self, client_id: str, wanted: Iterable[tuple[str, Credits]], ttl_s: float = 60.0
    ) -> list[Outcome]:
        """See `CreditBuckets.reserve_many`."""
        outcomes: list[Outcome] = self._run(self._buckets.reserve_many(client_id, wanted, ttl_s))
        return outcomes

    def settle_many(
        self, client_id: str, settled: Iterable[tuple[str, Sequence[Part]]], *, final: bool = True
    ) -> None:
        """See `CreditBuckets.settle_many`."""
        self._run(self._buckets.settle_many(client_id, settled, final=final))


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, name="meterline-quota", daemon=True)
        self._thread.start()

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        """Run one call there and wait for it. Ctrl-C while waiting cancels it.

        Raises:
            UserError: this is a forked process (threads stay behind at a fork), or the thread was stopped.
        """
        if os.getpid() != self._process_id:
            call.close()
            raise UserError(
                "these credit buckets were connected before a fork and can't be used from the new process; "
                "connect in the process that works (for example in a post-fork hook)"
            )
        if self._loop.is_closed() or threading.current_thread() is self._thread:
            call.close()
            raise UserError("these credit buckets are closed; connect again")
        future: Future[Result] = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop and its thread."""
        if self._loop.is_closed() or os.getpid() != self._process_id:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
