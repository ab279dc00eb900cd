"""Remembers what this process published lately, to tell a harmless retry from two charges under one id."""

from __future__ import annotations

from collections import OrderedDict

from meterline.domain.credits import format_credits
from meterline.domain.events import Correction, UsageEvent
from meterline.producer.errors import InvalidUsage

__all__ = ["RECENT_EVENTS_MAX", "RecentEvents"]

RECENT_EVENTS_MAX = 20_000
"""A forgotten `item=` shows within one task, so the charges of all tasks running at one time are enough; this
many take about 10 MB. What is older is told by metering, as a conflict among the dead letters."""

_Payload = tuple[str, int, bool, Correction | None]


class RecentEvents:
    """The payloads of the newest events by identity (client, event id). Not thread-safe: its owner locks."""

    def __init__(self, events_max: int = RECENT_EVENTS_MAX) -> None:
        self._events_max = events_max
        self._payloads: OrderedDict[tuple[str, str], _Payload] = OrderedDict()

    def __len__(self) -> int:
        return len(self._payloads)

    def note(self, event: UsageEvent) -> bool:
        """Remember an event.

        Returns:
            Whether it is new; False: the same event again, a retry.

        Raises:
            InvalidUsage: this id was published with another payload; one of the two would never be billed.
        """
        identity = (event.client_id, event.event_id)
        payload = (event.sku, event.credits_micro, event.billable, event.corrects)
        known = self._payloads.get(identity)
        if known is None:
            self._payloads[identity] = payload
            if len(self._payloads) > self._events_max:
                self._payloads.popitem(last=False)
            return True
        if known != payload:
            raise InvalidUsage(
                f"event {event.event_id} of client {event.client_id!r} (correlation id "
                f"{event.correlation_id!r}) was already published by this process as {_described(known)}, "
                f"now as {_described(payload)}; only one of them would be billed. "
                "If the task charges this SKU more than once, number the charges: item=0, item=1, ..."
            )
        return False

    def forget(self, event: UsageEvent) -> None:
        """The event never left: another payload may take its id."""
        self._payloads.pop((event.client_id, event.event_id), None)


def _described(payload: _Payload) -> str:
    sku, credits_micro, billable, _ = payload
    return f"{format_credits(credits_micro)} credits of {sku!r}{'' if billable else ' (not billable)'}"
