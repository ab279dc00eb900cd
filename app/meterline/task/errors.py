"""What can go wrong between finished work and Kafka, by what the caller should do about it."""

from __future__ import annotations

from meterline.errors import RetryLater, StopError

__all__ = ["SpoolCorrupt", "SpoolFailed", "SpoolFull"]


class SpoolFull(RetryLater):
    """No room for what this task would use: the work was not started. The text says which limit."""


class SpoolFailed(RetryLater):
    """This usage is not durable: run the task again; whatever did arrive has the same ids, counted once."""


class SpoolCorrupt(StopError):  # noqa: N818 - named for what happened
    """Durable usage can't be read any more. Nothing was deleted; the text names file and offset."""
