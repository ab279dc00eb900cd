"""Read a partition of a changelog, or of another compacted topic: the state it describes."""

from __future__ import annotations

from meterline.settings import KafkaSettings
from meterline.streaming.committed import read_committed

__all__ = ["read_changelog"]


def read_changelog(kafka: KafkaSettings, topic: str, partition: int) -> dict[bytes, bytes]:
    """The newest value of every key, deleted keys left out. Blocks: call it in a thread.

    The previous owner must be fenced first; otherwise it could commit behind the end that is read here.

    Raises:
        RetryLater: the broker doesn't answer.
    """
    state: dict[bytes, bytes] = {}
    for messages in read_committed(kafka, topic, partition):
        for message in messages:
            key, value = message.key() or b"", message.value()
            if value is None:
                state.pop(key, None)
            else:
                state[key] = value
    return state
