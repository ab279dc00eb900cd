"""Where the source topic's logs stand: identity, oldest and next offsets."""

from __future__ import annotations

from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from meterline.errors import RetryLater, UserError
from meterline.settings import KafkaSettings
from meterline.streaming.owner import LogRange

__all__ = ["offset_at", "read_log_ranges", "topic_partition_counts"]

ADMIN_TIMEOUT_S = 10.0


def _quiet(_error: object) -> None:
    """Connection errors: librdkafka would print connection errors; the exception below says what matters."""


def topic_partition_counts(kafka: KafkaSettings, topics: list[str]) -> dict[str, int]:
    """How many partitions each topic has. Blocks.

    Raises:
        UserError: a topic doesn't exist.
        RetryLater: the broker doesn't answer.
    """
    config: dict[str, Any] = kafka.client_config() | {"error_cb": _quiet, "log_level": 0}
    admin = AdminClient(config)
    try:
        known = admin.list_topics(timeout=ADMIN_TIMEOUT_S).topics
    except KafkaException as error:
        raise RetryLater(
            f"Kafka at {kafka.bootstrap_servers} does not answer ({error.args[0].str()}). Start the local "
            "stack with `meterline up`, or set METERLINE_KAFKA__BOOTSTRAP_SERVERS"
        ) from None
    missing = [topic for topic in topics if topic not in known]
    if missing:
        raise UserError(
            f"Kafka has no topic {', '.join(missing)}. Create the topics with: meterline topics apply"
        )
    return {topic: len(known[topic].partitions) for topic in topics}


def read_log_ranges(kafka: KafkaSettings, topic: str, partitions: list[int]) -> dict[int, LogRange]:
    """Identity and offsets of some partitions of a topic. Blocks.

    Raises:
        RetryLater: the broker doesn't answer.
    """
    config: dict[str, Any] = kafka.client_config() | {"error_cb": _quiet, "log_level": 0}
    admin = AdminClient(config)
    try:
        described = admin.describe_topics(TopicCollection([topic]), request_timeout=ADMIN_TIMEOUT_S)
        cluster = admin.describe_cluster(request_timeout=ADMIN_TIMEOUT_S)
        topic_id = str(described[topic].result().topic_id)
        cluster_id = cluster.result().cluster_id
    except KafkaException as error:
        raise RetryLater(f"describing {topic}: {error.args[0]}") from None
    reader = Consumer(config | {"group.id": f"{topic}-ranges", "enable.auto.commit": False})
    try:
        ranges = {}
        for partition in partitions:
            low, high = reader.get_watermark_offsets(
                TopicPartition(topic, partition), timeout=ADMIN_TIMEOUT_S
            )
            ranges[partition] = LogRange(cluster_id, topic, topic_id, partition, low, high)
    except KafkaException as error:
        raise RetryLater(f"reading the offsets of {topic}: {error.args[0]}") from None
    finally:
        reader.close()
    return ranges


def offset_at(kafka: KafkaSettings, topic: str, partition: int, appended_at_ms: int) -> int | None:
    """The first offset that was appended at or after a time; None: nothing was. Blocks.

    Raises:
        RetryLater: the broker doesn't answer.
    """
    config: dict[str, Any] = kafka.client_config() | {"error_cb": _quiet, "log_level": 0}
    reader = Consumer(config | {"group.id": f"{topic}-ranges", "enable.auto.commit": False})
    try:
        (found,) = reader.offsets_for_times(
            [TopicPartition(topic, partition, appended_at_ms)], timeout=ADMIN_TIMEOUT_S
        )
    except KafkaException as error:
        raise RetryLater(f"reading the offsets of {topic}: {error.args[0]}") from None
    finally:
        reader.close()
    return found.offset if found.offset >= 0 else None
