"""What happens by itself when time has come: periods end, drafts become final, rejections are reported.

Whoever is about to read or write first lets everything happen that was due by then, in order of time. So it
makes no difference how often somebody looks, or how far the clock was moved at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from meterline.local.sandbox import invoices, rejections, subscriptions
from meterline.local.sandbox.event_destinations import INVOICE_FINALIZED, snapshot_event
from meterline.local.sandbox.state import REPORT_WINDOW_S, Change, JsonObject, State

__all__ = ["Timeline"]

FINALIZE, END_PERIOD, REPORT = range(3)
"""In this order at one moment: no event received from then on is on the invoice that becomes final."""


class Timeline:
    """The moments to come, of one state. Built from it at a start, kept up with every record."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._moments: list[tuple[int, int, str]] = []
        for subscription in state.subscriptions.values():
            self._watch_subscription(subscription)
        for invoice in state.invoices.values():
            self._watch_invoice(invoice)
        for unreported in state.unreported.values():
            self._watch_rejection(unreported[0])

    def watch(self, changes: Iterable[Change]) -> None:
        """Note what these changes will make happen."""
        for change in changes:
            match change["kind"]:
                case "subscription":
                    self._watch_subscription(change["object"])
                case "invoice":
                    self._watch_invoice(change["object"])
                case "meter_event_rejected":
                    self._watch_rejection(change)

    def due(self, now: int) -> JsonObject | None:
        """The record of the next thing that has happened by now, dated when it was due; None: nothing has."""
        while self._moments and self._moments[0][0] <= now:
            moment, what, object_id = heapq.heappop(self._moments)
            if changes := self._happen(moment, what, object_id):
                return {"at": moment, "changes": list(changes)}
        return None

    def _happen(self, moment: int, what: int, object_id: str) -> tuple[Change, ...]:
        """The changes; none where the moment is no longer true."""
        if what == REPORT:
            meter_id, _, window = object_id.partition(" ")
            return rejections.report(self._state, meter_id, int(window), moment)
        if what == FINALIZE:
            invoice = self._state.invoices[object_id]
            if invoice["automatically_finalizes_at"] != moment:
                return ()
            final = invoices.final(self._state, invoice, moment)
            told = snapshot_event(self._state, INVOICE_FINALIZED, final, moment)
            return ({"kind": "invoice", "object": final}, *told)
        subscription = self._state.subscriptions[object_id]
        if _period_end(subscription) != moment:
            return ()
        return subscriptions.end_period(self._state, subscription)

    def _watch_subscription(self, subscription: JsonObject) -> None:
        heapq.heappush(self._moments, (_period_end(subscription), END_PERIOD, subscription["id"]))

    def _watch_rejection(self, rejection: Change) -> None:
        window = rejection["object"]["created"] // REPORT_WINDOW_S * REPORT_WINDOW_S
        moment = rejections.reported_at(self._state, rejection)
        heapq.heappush(self._moments, (moment, REPORT, f"{rejection['meter']} {window}"))

    def _watch_invoice(self, invoice: JsonObject) -> None:
        if (moment := invoice["automatically_finalizes_at"]) is not None:
            heapq.heappush(self._moments, (moment, FINALIZE, invoice["id"]))


def _period_end(subscription: JsonObject) -> int:
    end: int = subscription["items"]["data"][0]["current_period_end"]
    return end
