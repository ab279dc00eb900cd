"""What the racing tasks are to do: a function of seed, process and number, so that a re-run does the same."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["MICRO", "Spec", "spec_of"]

MICRO = 1_000_000
PUNCTUAL = {"plain": 40, "parts": 20, "void": 8, "cancel": 10, "rerun": 10, "conflict": 6, "renew": 10}
"""How often each kind: settled at once, in parts, failed before any cost, cancelled somewhere, run again
under the same event ids, another amount under a known event id, renewed while it runs."""
LATE = {"long": 12, "above": 4, "unreserved": 3}
"""What the terms of the bound are for: work that outlives its reservation, costs more, or never had one."""
UNIT_MICRO = (60 * MICRO, 420 * MICRO)
"""Two units a task on average: 3,200 tasks want about 1.3 million credits."""
UNITS_MAX = 3
SLACK_MAX = 0.2
"""A task reserves up to so much more than it will cost."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One task.

    Attributes:
        units: micro-credits of each unit of work.
        reserve: micro-credits to be set aside.
        conflict: micro-credits of the contradicting event.
        cancel_after_s: for a task to be cancelled.
    """

    name: str
    kind: str
    units: tuple[int, ...]
    reserve: int
    pause_s: float
    conflict: int = 0
    cancel_after_s: float = 0.0

    def event_id(self, unit: int) -> str:
        return f"{self.name}/{unit}"

    def sku(self, unit: int) -> str:
        return ("gpu-second", "tokens", "storage")[unit % 3]


def spec_of(seed: str, slot: int, number: int, *, late: bool, pause_s: float) -> Spec:
    """The task; `pause_s` is the longest time of one unit of work."""
    chance = random.Random(f"{seed}/{slot}/{number}")
    kinds = PUNCTUAL | (LATE if late else {})
    kind = chance.choices(list(kinds), list(kinds.values()))[0]
    units = tuple(chance.randint(*UNIT_MICRO) for _ in range(chance.randint(1, UNITS_MAX)))
    conflict = chance.randint(*UNIT_MICRO) if kind == "conflict" else 0
    reserve = int((sum(units) + conflict) * chance.uniform(1.0, 1.0 + SLACK_MAX))
    if kind == "above":
        reserve = sum(units) // 2
    return Spec(
        name=f"{seed}-{slot}-{number}",
        kind=kind,
        units=units,
        reserve=reserve,
        pause_s=chance.uniform(0.1, 1.0) * pause_s,
        conflict=conflict,
        cancel_after_s=chance.uniform(0.0, 3.0) * pause_s,
    )
