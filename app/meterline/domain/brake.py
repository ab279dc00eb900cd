"""The brake on dead letters: whether what is refused is one client's trouble or everybody's.

A record of poison costs one dead letter, and a client that sends nothing else stops nobody. But when a wrong
deployment spoils the records of many clients, going on would drain the topic into the dead-letter topic: then
the partition stops, with those records still in the log, and counts them when the cause is gone.

Counted by the log alone, in blocks of offsets, so that the same records stop it again, whatever the chunks,
the restarts and the speed at which they are read.
"""

from __future__ import annotations

import json
from collections import Counter
from hashlib import blake2b

__all__ = ["BRAKE_BLOCK_OFFSETS", "Brake"]

BRAKE_BLOCK_OFFSETS = 1_000
"""Offsets that are looked at together: enough for a share to mean something, few enough to stop early. And so
the state of a brake is at most this many numbers."""

CLIENT_BYTES = 8
"""Of a client's hash: a key can be as long as a record, and of a thousand no two are alike by chance."""

REASONS_SHOWN_MAX = 3


class Brake:
    """Trips when a block holds more dead letters than allowed, however few of them one client has part in.

    No client counts for more than its share: `clients_min` - 1 of them, refused as often as they like, stay
    at or below the limit together.

    Args:
        dead_letters_max: of a block, each client counted up to its share.
        clients_min: fewer clients than this never trip it. At least 2.
    """

    def __init__(self, dead_letters_max: int, clients_min: int) -> None:
        self._max = dead_letters_max
        self._clients_min = clients_min
        self._share = max(1, dead_letters_max // (clients_min - 1))
        self._begin(0)
        self.flood = ""
        """Why it tripped, for people; empty: it didn't."""

    def _begin(self, block: int) -> None:
        self._block = block
        self._counted = 0
        self._by_client: Counter[str] = Counter()
        self._by_reason: Counter[str] = Counter()

    def count(self, offset: int, client: bytes, reason: str) -> None:
        """One more dead letter.

        Args:
            offset: of its record; they come in order.
            client: whose record it is, or its key if nobody can tell.
            reason: its code.
        """
        block = offset // BRAKE_BLOCK_OFFSETS
        if block != self._block:
            self._begin(block)
        name = blake2b(client, digest_size=CLIENT_BYTES).hexdigest()
        self._by_reason[reason] += 1
        self._by_client[name] += 1
        self._counted += self._by_client[name] <= self._share
        if self._counted > self._max and len(self._by_client) >= self._clients_min and not self.flood:
            first = block * BRAKE_BLOCK_OFFSETS
            reasons = ", ".join(
                f"{times} {reason}" for reason, times in self._by_reason.most_common(REASONS_SHOWN_MAX)
            )
            self.flood = (
                f"{self._by_client.total()} of the records at offsets {first}..{offset} are dead letters, "
                f"of {len(self._by_client)} clients ({reasons})"
            )

    def to_bytes(self) -> bytes:
        """What is to be remembered with the dead letters of a flush (JSON)."""
        counts = {"block": self._block, "clients": self._by_client, "reasons": self._by_reason}
        return json.dumps(counts, separators=(",", ":")).encode()

    def restore(self, data: bytes) -> None:
        """Go on from `to_bytes`; the limits may be others now."""
        counts = json.loads(data)
        self._begin(counts["block"])
        self._by_client.update(counts["clients"])
        self._by_reason.update(counts["reasons"])
        self._counted = sum(min(times, self._share) for times in self._by_client.values())
