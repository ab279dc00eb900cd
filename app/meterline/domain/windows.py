"""Tumbling windows: half-open `[start, end)` in UTC milliseconds, and the snapshots published of them."""

from __future__ import annotations

from dataclasses import dataclass

from meterline.domain.encoding import hash_hex

__all__ = ["SKUS_PER_WINDOW_MAX", "SkuTotal", "WindowRef", "WindowSnapshot", "window_start_of"]

SKUS_PER_WINDOW_MAX = 4_000
"""SKUs of one client in one window: with ids of 200 bytes the snapshot stays below the 1 MiB record limit."""


def window_start_of(occurred_at: int, length_ms: int) -> int:
    """Start of the window that holds a time; windows are aligned to the epoch."""
    return occurred_at - occurred_at % length_ms


@dataclass(slots=True)
class SkuTotal:
    """What one SKU adds up to in a window: billable events and, apart from them, free ones."""

    count: int = 0
    credits_micro: int = 0
    free_count: int = 0
    free_credits_micro: int = 0

    def copy(self) -> SkuTotal:
        """What it is now; `dataclasses.replace` takes seven times as long, for each SKU of a window."""
        return SkuTotal(self.count, self.credits_micro, self.free_count, self.free_credits_micro)


@dataclass(frozen=True, slots=True)
class WindowRef:
    """Which window: of one client, from one partition of the source topic."""

    client_id: str
    start: int
    end: int
    topic_id: str
    partition: int

    @property
    def window_id(self) -> str:
        """32 hexadecimal digits, the same whoever computes it (golden vectors: `schemas/golden`)."""
        return hash_hex(
            "meterline.window.1", self.client_id, self.start, self.end, self.topic_id, self.partition
        )


@dataclass(frozen=True, slots=True)
class WindowSnapshot:
    """A statement that is true for ever: what a window holds as of `cutoff_offset` of its partition."""

    ref: WindowRef
    cutoff_offset: int
    skus: dict[str, SkuTotal]
    closed_at: int
    watermark: int

    @property
    def billable_credits_micro(self) -> int:
        """What the client owes for this window."""
        return sum(total.credits_micro for total in self.skus.values())

    def same_amounts(self, other: WindowSnapshot) -> bool:
        """Whether two snapshots say the same; times are no part of the statement."""
        return self.skus == other.skus
