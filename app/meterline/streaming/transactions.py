"""A partition's fenced producer: whoever starts it last is the owner, the broker refuses the others."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Iterable
from typing import Any, Protocol, cast

from aiokafka import AIOKafkaProducer

from meterline.settings import KafkaSettings
from meterline.streaming.owner import Commit
from meterline.streaming.steps import Step, reached

__all__ = ["FencedProducer", "TransactionalClient", "transactional_client", "transactional_id_of"]

TRANSACTION_TIMEOUT_MS = 15_000
"""An owner that stalls inside a transaction holds up readers at most this long (plus the coordinator's 10 s
scan); a transaction itself takes milliseconds."""

BATCH_BYTES_MAX = 1_500_000
"""Below the 2 MiB limit of the topics we write to; a window of the most and longest SKUs takes a million."""

REQUEST_BYTES_MAX = 2_000_000
"""A batch and its framing."""

STOP_TIMEOUT_S = 5.0

_Record = tuple[bytes | None, bytes | None, tuple[tuple[str, bytes], ...]]
"""Key, value, headers: an object for each of the thousands of a flush would cost more than sending it."""


def transactional_id_of(group: str, source_topic: str, partition: int) -> str:
    """The id under which a consumer group's owner of a partition commits: who starts last with it owns it."""
    return f"{group}-{source_topic}-{partition}"


class TransactionalClient(Protocol):
    """What is used of aiokafka's producer. Whatever it raises, the outcome is unknown."""

    async def start(self) -> None:
        """Fence every earlier producer of the id; its open transaction is finished or aborted first."""

    async def stop(self) -> None:
        """Let go of the connections. An open transaction stays open until somebody starts or it times out."""

    async def begin_transaction(self) -> None:
        """Only a note in this process: the broker hears of it with the first batch."""

    async def commit_transaction(self) -> None:
        """Wait for the batches, then commit; returns when the broker has decided."""

    def create_batch(self) -> Any:
        """Aiokafka's BatchBuilder: `append` (None: full) and `close`."""

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> Awaitable[Any]:
        """Queue a batch as part of the transaction; what it returns ends when the broker has it."""


class FencedProducer:
    """Transactions of one source partition.

    Any error out of `transact` leaves the outcome unknown and the producer useless: the process must exit.
    The next owner's `start` finishes or aborts what was open, and only then is the state read.
    """

    def __init__(self, client: TransactionalClient, changelog: str, partition: int) -> None:
        self._changelog = changelog
        self._partition = partition
        self._producer = client

    async def start(self) -> None:
        """Fence every earlier producer of this id; their open transaction is finished or aborted first."""
        await self._producer.start()

    async def transact(self, commit: Commit) -> None:
        """Write all of a commit or nothing of it."""
        batches: dict[tuple[str, int], list[_Record]] = defaultdict(list)
        for output in commit.outputs:
            batches[output.topic, output.partition].append((output.key, output.value, output.headers))
        await self._producer.begin_transaction()
        reached(Step.TRANSACTION_BEGUN)
        acknowledgements = []
        if commit.changelog:
            state = ((key, value, ()) for key, value in commit.changelog)
            acknowledgements += await self._send(self._changelog, self._partition, state)
        for (topic, partition), records in batches.items():
            acknowledgements += await self._send(topic, partition, records)
        # aiokafka doesn't tell the transaction about a rejected batch: a commit would succeed without it.
        for acknowledgement in acknowledgements:
            await acknowledgement
        reached(Step.TRANSACTION_PRODUCED)
        await self._producer.commit_transaction()
        reached(Step.TRANSACTION_COMMITTED)

    async def _send(self, topic: str, partition: int, records: Iterable[_Record]) -> list[Any]:
        acknowledgements = []
        batch = self._producer.create_batch()
        for key, value, headers in records:
            if batch.append(key=key, value=value, timestamp=None, headers=list(headers)) is None:
                batch.close()
                acknowledgements.append(await self._producer.send_batch(batch, topic, partition=partition))
                batch = self._producer.create_batch()
                if batch.append(key=key, value=value, timestamp=None, headers=list(headers)) is None:
                    raise ValueError(f"a record for {topic} is larger than {BATCH_BYTES_MAX} bytes")
        batch.close()
        acknowledgements.append(await self._producer.send_batch(batch, topic, partition=partition))
        return acknowledgements

    async def stop(self) -> None:
        """Let go of the connections; bounded, because a broker that is away must not hold up a stop."""
        try:
            await asyncio.wait_for(self._producer.stop(), STOP_TIMEOUT_S)
        except Exception:  # noqa: BLE001 - a fenced producer may refuse to stop; the connections die with us
            return


def transactional_client(kafka: KafkaSettings, transactional_id: str) -> TransactionalClient:
    """A producer over aiokafka, not started yet."""
    producer = AIOKafkaProducer(
        **aiokafka_config(kafka),
        transactional_id=transactional_id,
        transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        max_batch_size=BATCH_BYTES_MAX,
        max_request_size=REQUEST_BYTES_MAX,
        linger_ms=0,
        acks="all",
    )
    return cast(TransactionalClient, producer)


def aiokafka_config(kafka: KafkaSettings) -> dict[str, Any]:
    """The settings every aiokafka client needs."""
    config: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers,
        "security_protocol": kafka.security_protocol,
    }
    if kafka.security_protocol.startswith("SASL"):
        config |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.sasl_username,
            "sasl_plain_password": kafka.sasl_password.get_secret_value(),
        }
    if kafka.security_protocol.endswith("SSL"):
        from aiokafka.helpers import create_ssl_context  # noqa: PLC0415 - only where TLS is used

        config["ssl_context"] = create_ssl_context(cafile=kafka.ssl_ca_location or None)
    return config
