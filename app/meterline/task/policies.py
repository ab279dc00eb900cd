"""`ClientPolicies`: what each client's work does while Redis is away, as the client registry says."""

from __future__ import annotations

import logging
import threading
from typing import Self

from meterline.clients import ClientRegistry
from meterline.domain.clients import QuotaPolicy
from meterline.errors import MeterlineError
from meterline.settings import Settings

__all__ = ["ClientPolicies"]

TRY_AGAIN_S = 5.0
"""Kafka may be away when a worker starts: it starts, and denies until it knows more."""
JOIN_S_MAX = 1.0
"""A question to a Kafka that is away takes longer; it ends by itself, and nobody waits for its answer."""

log = logging.getLogger("meterline.task")


class ClientPolicies:
    """A function of the client id, for `CreditBuckets`. Whom it doesn't know, it denies. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry: ClientRegistry | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="meterline-policies", daemon=True)

    def start(self) -> Self:
        """Begin to follow the registry; returns at once."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop following."""
        self._stopping.set()
        self._thread.join(JOIN_S_MAX)

    def __call__(self, client_id: str) -> QuotaPolicy:
        """The client's policy."""
        registry = self._registry
        if registry is None:
            return QuotaPolicy.DENY
        try:
            client = registry.get(client_id)
        except MeterlineError:
            return QuotaPolicy.DENY
        return QuotaPolicy.DENY if client is None else client.quota_policy

    def _follow(self) -> None:
        """Keep a registry that works."""
        while not self._stopping.is_set():
            try:
                with ClientRegistry(self._settings) as registry:
                    self._registry = registry
                    while not self._stopping.wait(TRY_AGAIN_S):
                        registry.get("")  # raises what ended it
            except MeterlineError as error:
                log.warning(
                    "clients' quota policies are not known yet, without Redis they are denied: %s", error
                )
                self._stopping.wait(TRY_AGAIN_S)
            finally:
                self._registry = None
