"""Read a partition of a changelog: all that was committed, nothing that was aborted."""

from __future__ import annotations

from confluent_kafka import Consumer, KafkaError, TopicPartition

from meterline.errors import RetryLater
from meterline.settings import KafkaSettings

__all__ = ["read_changelog"]

READ_TIMEOUT_S = 60.0
"""A poll that brings nothing for this long means the broker is away, not that the partition is long."""


def read_changelog(kafka: KafkaSettings, topic: str, partition: int) -> dict[bytes, bytes]:
    """The newest value of every key, deleted keys left out. Blocks: call it in a thread.

    The previous owner must be fenced first; otherwise it could commit behind the end that is read here.

    Raises:
        RetryLater: the broker doesn't answer.
    """
    consumer = Consumer(
        kafka.client_config()
        | {
            "group.id": f"{topic}-reader",  # never commits; librdkafka wants a name
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 50,  # an empty partition is the common case and must not wait
            "queued.min.messages": 200_000,
            "fetch.queue.backoff.ms": 10,
        }
    )
    state: dict[bytes, bytes] = {}
    try:
        consumer.assign([TopicPartition(topic, partition, 0)])
        quiet_s = 0.0
        while True:
            messages = consumer.consume(10_000, timeout=0.05)
            quiet_s = 0.0 if messages else quiet_s + 0.05
            if quiet_s > READ_TIMEOUT_S:
                raise RetryLater(f"no answer from Kafka while reading {topic}-{partition}")
            for message in messages:
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:
                        return state
                    if error.fatal() or not error.retriable():
                        raise RetryLater(f"reading {topic}-{partition}: {error}")
                    continue
                key, value = message.key() or b"", message.value()
                if value is None:
                    state.pop(key, None)
                else:
                    state[key] = value
    finally:
        consumer.close()
