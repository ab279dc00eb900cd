"""What a racing process has to do, and what its own log says of its former lives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meterline.producer.usage import Acknowledged

__all__ = ["KILLS", "Attempt", "RacerPlan", "Unit", "former_attempts"]

KILLS = ("reserved", "renewed", "worked", "published", "acknowledged", "settled")
"""Where a process kills itself: after that step, before the next. `acknowledged`: between publish, settle."""


@dataclass(frozen=True, slots=True)
class RacerPlan:
    """What one process has to do; given as a JSON file."""

    seed: str
    slot: int
    tasks: int
    client_id: str
    topic_id: str
    log: str
    ttl_s: float
    concurrency: int
    pause_s: float
    late: bool = False
    lease_ttl_s: float = 0.0
    """0: no leases."""
    lease_share: float = 0.01
    kills: tuple[str, ...] = ()
    """One after the other; after the last it lives on."""
    kill_within: int = 12
    """A life ends when its step is reached for the n-th time, n up to this."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> RacerPlan:
        return cls(**json.loads(path.read_text()))


@dataclass(slots=True)
class Unit:
    """A unit of work that was done, and where Kafka has it."""

    event_id: str
    task: str
    sku: str
    micro: int
    place: Acknowledged | None = None


@dataclass(slots=True)
class Attempt:
    """One reservation and what was done under it."""

    rid: str | None
    units: list[Unit] = field(default_factory=list)
    others: list[tuple[Acknowledged, int]] = field(default_factory=list)
    """Contradicting events: settled as well, charged never."""
    settled: int = 0
    """Units that were named in a settle call."""
    is_void: bool = False


def former_attempts(
    lines: list[Mapping[str, Any]],
) -> tuple[dict[str | None, Attempt], set[str | None], set[str]]:
    """What former lives began, which of it is ended, and which tasks are done."""
    attempts: dict[str | None, Attempt] = {}
    by_event: dict[tuple[str | None, str], Unit] = {}
    ended: set[str | None] = set()
    for line in lines:
        do, rid = line["do"], line.get("rid")
        if do == "end":
            ended.add(rid)
        elif do == "ask":
            attempts.setdefault(rid, Attempt(rid))
        elif do == "void":
            attempts.setdefault(rid, Attempt(rid)).is_void = True
        elif do == "work":
            unit = Unit(line["event"], line["task"], line["sku"], line["micro"])
            if by_event.setdefault((rid, line["event"]), unit) is unit:
                attempts.setdefault(rid, Attempt(rid)).units.append(unit)
        elif do == "ack":
            by_event[rid, line["event"]].place = Acknowledged(line["partition"], line["offset"])
    return attempts, ended, {line["task"] for line in lines if line["do"] == "done"}
