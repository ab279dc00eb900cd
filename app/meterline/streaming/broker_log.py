"""What the engine asks of Kafka, apart from delivery: where logs stand, committed state, producers.

One contract suite (tests/contract/test_broker_log.py) holds for Kafka and for the simulated log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from meterline.settings import KafkaSettings
from meterline.streaming.changelog import read_changelog
from meterline.streaming.log_ranges import read_log_ranges
from meterline.streaming.owner import LogRange
from meterline.streaming.transactions import TransactionalClient, transactional_client

__all__ = ["BrokerLog", "KafkaLog"]

T = TypeVar("T")

READER_THREADS = 8
"""Changelogs read side by side when many partitions arrive at once; librdkafka does the work."""


class BrokerLog(Protocol):
    """The port. Both reads raise RetryLater while the broker doesn't answer: nothing was decided then."""

    async def read_ranges(self, topic: str, partitions: list[int]) -> Mapping[int, LogRange]:
        """Identity, oldest offset and last stable offset of some partitions."""

    async def read_state(self, changelog: str, partition: int) -> dict[bytes, bytes]:
        """The newest committed value of every key, deleted keys left out.

        Whoever may still write must be fenced first; otherwise it could commit behind the end that is read.
        """

    def transactional_client(self, transactional_id: str) -> TransactionalClient:
        """A producer that is not started yet. Of all started ones of an id only the newest can write."""

    def close(self) -> None:
        """Give up reads that still run."""


class KafkaLog:
    """A Kafka cluster: blocking reads in threads of their own, producers of aiokafka."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._threads = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="restore")

    async def read_ranges(self, topic: str, partitions: list[int]) -> Mapping[int, LogRange]:
        """See BrokerLog."""
        return await self._in_thread(read_log_ranges, self._kafka, topic, partitions)

    async def read_state(self, changelog: str, partition: int) -> dict[bytes, bytes]:
        """See BrokerLog."""
        return await self._in_thread(read_changelog, self._kafka, changelog, partition)

    def transactional_client(self, transactional_id: str) -> TransactionalClient:
        """See BrokerLog."""
        return transactional_client(self._kafka, transactional_id)

    def close(self) -> None:
        """See BrokerLog."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
