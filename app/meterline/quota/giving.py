"""Publish a grant: an event on `credit.grants`, kept for ever, from which every bucket is rebuilt."""

from __future__ import annotations

import logging
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import grant_to_record
from meterline.contracts.topics import CREDIT_GRANTS
from meterline.domain.grants import CreditGrant, check_grant
from meterline.errors import RetryLater, UserError
from meterline.settings import KafkaSettings

__all__ = ["publish_grant"]

ANSWER_S_MAX = 10.0
"""A person waits at most this long to hear that Kafka is away."""

_kafka_log = logging.getLogger("meterline.quota.kafka")
_kafka_log.addHandler(logging.NullHandler())  # the application decides whether librdkafka's messages are seen

_NO_TOPIC = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}  # noqa: SLF001 - librdkafka's public codes


def publish_grant(kafka: KafkaSettings, grant: CreditGrant) -> tuple[int, int]:
    """Write the grant; returns when all in-sync replicas have it.

    Again with the same grant id: harmless, the first one in the log counts.

    Returns:
        Partition and offset.

    Raises:
        UserError: a field breaks a rule, or the topic does not exist; nothing was written.
        RetryLater: not acknowledged: it may have been written. Publish it again, with the same grant id.
    """
    try:
        check_grant(grant)
    except ValueError as error:
        raise UserError(str(error)) from None
    value = RecordCodec("credit-grant", kafka.registry_url).encode(grant_to_record(grant))
    config: dict[str, Any] = {
        "client.id": "meterline-quota",
        "logger": _kafka_log,
        "enable.idempotence": True,
        "acks": "all",
        "partitioner": "murmur2",
        "message.timeout.ms": int(ANSWER_S_MAX * 1000),
        **kafka.client_config(),
    }
    try:
        producer = Producer(config)
    except KafkaException as error:
        raise UserError(f"Kafka's client refuses the METERLINE_KAFKA__ settings: {error}") from None
    answers: list[tuple[KafkaError | None, Any]] = []
    try:
        producer.produce(
            CREDIT_GRANTS, value, grant.client_id.encode(), on_delivery=lambda *answer: answers.append(answer)
        )
        producer.flush(ANSWER_S_MAX + 1)
    except KafkaException as error:
        answers.append((error.args[0], None))
    failure, message = answers[0] if answers else (None, None)
    if message is not None and failure is None:
        return int(message.partition()), int(message.offset())
    if failure is not None and failure.code() in _NO_TOPIC:
        raise UserError(
            f"Kafka at {kafka.bootstrap_servers} has no topic {CREDIT_GRANTS}. Create the topics with "
            "`meterline topics apply`."
        )
    raise RetryLater(
        f"Kafka at {kafka.bootstrap_servers} did not acknowledge the grant "
        f"({failure.str() if failure else 'no answer'}). Start the local stack with `meterline up`, or set "
        "METERLINE_KAFKA__BOOTSTRAP_SERVERS."
    )
