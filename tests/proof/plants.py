"""Mistakes made on purpose in Redis, behind everybody's back: the proof must say what is wrong, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.proof.quota_checker import credits_text
from tests.proof.quota_evidence import tag_of
from tests.proof.race import Race

__all__ = ["PLANTED_MICRO", "PLANTS"]

PLANTED_MICRO = 12_345_678_901
"""12,345.678901 credits."""
NEVER_REACHED = 2**40
"""An offset that the log doesn't reach."""


def oversell(race: Race) -> None:
    """More is granted than the log says."""
    tag = tag_of(race.pipeline.places.namespace, race.client_id)
    with race.pipeline.redis() as redis:
        redis.hincrby(f"{tag}b:{race.client_id}", "granted", PLANTED_MICRO)


def leak(race: Race) -> None:
    """Usage that the log never accounts stays provisional."""
    tag = tag_of(race.pipeline.places.namespace, race.client_id)
    with race.pipeline.redis() as redis:
        redis.zadd(
            f"{tag}p:{race.pipeline.topic_id}:0:{race.client_id}",
            {f"{NEVER_REACHED}:{PLANTED_MICRO}": NEVER_REACHED},
        )
        redis.hincrby(f"{tag}b:{race.client_id}", "prov", PLANTED_MICRO)


PLANTS: Mapping[str, tuple[Callable[[Race], None], str]] = {
    "oversell": (oversell, f"{credits_text(PLANTED_MICRO)} credits too much"),
    "leak": (leak, f"leak: {credits_text(PLANTED_MICRO)} credits are still provisional"),
}
"""What is done, and what must be said of it."""
