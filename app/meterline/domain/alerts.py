"""When a client must hear that credits run out: levels, and the epoch in which each is told once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meterline.domain.buckets import BucketBalance
from meterline.domain.encoding import hash_hex

__all__ = ["EXHAUSTED_PERCENT", "CreditAlert", "alert_id", "levels_reached"]

EXHAUSTED_PERCENT = 100
"""The level every client has: nothing is left."""


@dataclass(frozen=True, slots=True)
class CreditAlert:
    """A client's credits have reached a level. Amounts and time are those of the moment it was raised.

    Attributes:
        alert_id: the same for every copy.
        level_percent: of the granted credits used; 100: exhausted.
        period_start: milliseconds; None for prepaid credits.
        raised_at: milliseconds.
    """

    alert_id: str
    client_id: str
    level_percent: int
    period_start: int | None
    granted_credits_micro: int
    consumed_credits_micro: int
    provisional_credits_micro: int
    reserved_credits_micro: int
    available_credits_micro: int
    raised_at: int


def alert_id(client_id: str, level_percent: int, epoch: str) -> str:
    """Name of the alert of a level.

    Args:
        epoch: in which it is raised once: a budget's period, or, of prepaid credits, what was granted so far,
            so that a top-up arms it again.
    """
    return hash_hex("meterline.alert.1", client_id, level_percent, epoch)


def levels_reached(levels: Iterable[int], balance: BucketBalance, *, refused: bool) -> list[int]:
    """Which levels the used credits have reached, ascending.

    Exhausted is who used all, and whose work was refused although nothing is held that may come back. A
    client that was granted nothing has reached no level: it has no credits that could run out.

    Args:
        refused: work was refused for lack of credits since the last look.
    """
    if balance.granted <= 0:
        return []
    used = balance.consumed + balance.provisional
    reached = {level for level in levels if used * 100 >= level * balance.granted}
    if used >= balance.granted or (refused and (balance.available <= 0 or balance.reserved == 0)):
        reached.add(EXHAUSTED_PERCENT)
    return sorted(reached)
