"""Whether a client's usage records are sent: what persons ordered last, and what the registry says."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

from meterline.domain.clients import Client

__all__ = ["ALL_CLIENTS", "Clients", "Switch", "Switches"]

ALL_CLIENTS = ""
"""Client id of an order that is about every client."""


class Switch(StrEnum):
    """What becomes of records. The words are orders, too."""

    ON = "resume"
    PAUSED = "pause"
    """Records are made and wait; past their invoice they are carried."""
    SHADOW = "shadow"
    """Records are made and never sent: to compare with another way of billing."""


class Clients(Protocol):
    """What billing needs of the client registry."""

    version: int

    def get(self, client_id: str) -> Client | None:
        """The client, or None."""


class Switches:
    """The switches of a worker. Sending needs all of them on: one client's doesn't lift that of all."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._ordered: Mapping[str, Switch] = {}

    def set(self, ordered: Mapping[str, Switch]) -> None:
        """The newest order for each client; `ALL_CLIENTS` for all."""
        self._ordered = dict(ordered)

    def of(self, client_id: str) -> Switch:
        """Shadow goes before a pause: a record in shadow must not become one that waits to be sent."""
        ordered = {self._ordered.get(ALL_CLIENTS), self._ordered.get(client_id)}
        if Switch.SHADOW in ordered:
            return Switch.SHADOW
        client = self._clients.get(client_id)
        if Switch.PAUSED in ordered or (client is not None and client.sending_paused):
            return Switch.PAUSED
        return Switch.ON
