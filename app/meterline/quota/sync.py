"""The same words for plain threads: all threads' calls run on one event-loop thread, batched there."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol

from meterline.quota.answers import Balance, Credits, Outcome, Part, Reservation

__all__ = ["AsyncBuckets", "SyncCreditBuckets"]


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
        self, client_id: str, wanted: Mapping[str, Credits], ttl_s: float = ...
    ) -> dict[str, Outcome]:
        """See `CreditBuckets.reserve_many`."""

    async def settle_many(
        self, client_id: str, settled: Mapping[str, Sequence[Part]], *, final: bool = ...
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
        self, client_id: str, wanted: Mapping[str, Credits], ttl_s: float = 60.0
    ) -> dict[str, Outcome]:
        """See `CreditBuckets.reserve_many`."""
        outcomes: dict[str, Outcome] = self._run(self._buckets.reserve_many(client_id, wanted, ttl_s))
        return outcomes

    def settle_many(
        self, client_id: str, settled: Mapping[str, Sequence[Part]], *, final: bool = True
    ) -> None:
        """See `CreditBuckets.settle_many`."""
        self._run(self._buckets.settle_many(client_id, settled, final=final))
