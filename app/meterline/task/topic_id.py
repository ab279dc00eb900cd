"""Which topic `usage.events` is: a topic that was deleted and made again is another one, with new offsets."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from meterline.contracts.topics import USAGE_EVENTS
from meterline.settings import KafkaSettings

__all__ = ["TopicIdentity"]

ANSWER_S = 10.0
ASK_AGAIN_S = 1.0
"""After no answer."""
TRUSTED_S = 60.0
"""Asked anew after this long: a topic made again halts metering, which takes a person longer to repair."""

log = logging.getLogger("meterline.task")


def _quiet(_error: object) -> None:
    """Connection errors: the producer tells of them."""


class TopicIdentity:
    """Asks in the background; for one thread."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._config: dict[str, Any] = kafka.client_config() | {"error_cb": _quiet, "log_level": 0}
        self._admin: AdminClient | None = None
        self._answer: Future[Any] | None = None
        self._ask_at = 0.0
        self._topic_id: str | None = None

    def current(self) -> str | None:
        """The id as metering writes it; None: not yet known. Never blocks."""
        now = time.monotonic()
        if self._answer is None and now >= self._ask_at:
            self._admin = self._admin or AdminClient(self._config)
            topics = TopicCollection([USAGE_EVENTS])
            self._answer = self._admin.describe_topics(topics, request_timeout=ANSWER_S)[USAGE_EVENTS]
        if self._answer is not None and self._answer.done():
            answer, self._answer = self._answer, None
            try:
                self._topic_id = str(answer.result().topic_id)
                self._ask_at = now + TRUSTED_S
            except KafkaException as error:
                log.debug("Kafka does not tell the topic's id: %s", error.args[0])
                self._ask_at = now + ASK_AGAIN_S
        return self._topic_id
