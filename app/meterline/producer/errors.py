"""What can go wrong when usage is published, by what the caller should do about it."""

from __future__ import annotations

from meterline.errors import RetryLater, UserError

__all__ = ["DeliveryFailed", "InvalidUsage"]

LISTED_MAX = 5
"""Event ids in the error's text; all of them are in `DeliveryFailed.events`."""


class InvalidUsage(UserError, ValueError):  # noqa: N818 - named for what was given
    """This event would be refused by metering (or contradicts one just published). Nothing was published."""


class DeliveryFailed(RetryLater):
    """Kafka did not acknowledge these events. Publish them again: a copy that did arrive is counted once.

    Attributes:
        events: event id and reason of each, in the order in which Kafka's client gave them up.
    """

    def __init__(self, events: tuple[tuple[str, str], ...]) -> None:
        listed = "; ".join(f"{event_id} ({reason})" for event_id, reason in events[:LISTED_MAX])
        more = f"; and {len(events) - LISTED_MAX} more" if len(events) > LISTED_MAX else ""
        super().__init__(
            f"{len(events)} event(s) were not acknowledged by Kafka: {listed}{more}. "
            "Publish them again; an event that did arrive is counted once."
        )
        self.events = events
