"""What one spooled event is, in bytes: its schema's own, behind two of the spool's."""

from __future__ import annotations

from typing import NamedTuple

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import event_from_record, event_to_record
from meterline.domain.events import UsageEvent
from meterline.errors import DeadLetterError
from meterline.task.errors import SpoolCorrupt

__all__ = ["SpooledEvent", "SpooledEvents"]

VERSION = 1
FINAL = 1


class SpooledEvent(NamedTuple):
    """Usage of a finished task.

    Attributes:
        final: nothing more will come under its reservation.
    """

    event: UsageEvent
    final: bool


class SpooledEvents:
    """To bytes and back. Without a registry, as the spool must do without everything; thread-safe."""

    def __init__(self) -> None:
        self._codec = RecordCodec("usage-event")

    def encode(self, event: UsageEvent) -> bytes:
        """The record of an event; `closing` makes it the last of its reservation."""
        return bytes((VERSION, 0)) + self._codec.encode(event_to_record(event))

    def closing(self, record: bytes) -> bytes:
        """The same record, as the last one of its reservation."""
        return bytes((VERSION, FINAL)) + record[2:]

    def decode(self, record: bytes) -> SpooledEvent:
        """What a record says.

        Raises:
            SpoolCorrupt: a program of another version wrote it.
        """
        if record[0] != VERSION:
            raise SpoolCorrupt(
                f"a spooled event has format {record[0]}, this program knows {VERSION}: drain the spool with "
                "the version that wrote it"
            )
        try:
            event = event_from_record(self._codec.decode(record[2:]))
        except DeadLetterError as error:
            raise SpoolCorrupt(f"a spooled event can't be read: {error}. Nothing was deleted.") from None
        return SpooledEvent(event, bool(record[1] & FINAL))
