"""Operations as the library sends them: written once when a call is made, joined when its batch leaves.

`scripts.packed` packs the same operations from arrays and checks them, for those who make few; a test holds
the two against each other. Here what callers give is checked before, and text is cheaper than arrays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as json_text
from typing import Any, Final

from meterline.quota.answers import Part

__all__ = ["BALANCE", "Op", "as_array", "flattened", "lease", "renew", "reserve", "settle", "void"]

Op = str | tuple[str, Sequence[Part]]
"""JSON values separated by commas; and parts to follow them, by the number of their source in the batch."""

BALANCE: Final = '"b"'


def reserve(reservation_id: str, micro: int, ttl_ms: int) -> str:
    """Take a hold."""
    return f'"r",{json_text(reservation_id)},{micro},{ttl_ms}'


def settle(reservation_id: str, parts: Sequence[Part], *, final: bool) -> Op:
    """Turn a hold into provisional consumption."""
    return f'"s",{json_text(reservation_id)},{"1" if final else "0"}', parts


def void(reservation_id: str) -> str:
    """Free a hold."""
    return f'"v",{json_text(reservation_id)}'


def renew(reservation_id: str, micro: int, ttl_ms: int, generation: int) -> str:
    """Prolong a hold; in a generation newer than `generation` take it again."""
    return f'"n",{json_text(reservation_id)},{micro},{ttl_ms},{generation}'


def lease(
    reservation_id: str, number: int, hold: int, parts: Sequence[Part], *, ttl_ms: int, generation: int
) -> Op:
    """State a lease."""
    return f'"l",{json_text(reservation_id)},{number},{hold},{ttl_ms},{generation}', parts


def flattened(ops: Sequence[Op]) -> tuple[bytes, bytes]:
    """The last two arguments of the script: the source partitions named, and one flat JSON array."""
    sources: dict[tuple[str, int], int] = {}
    pieces: list[str] = []
    number, last_topic, last_partition = 0, "", -1
    for op in ops:
        if isinstance(op, str):
            pieces.append(op)
            continue
        head, parts = op
        pieces.append(f"{head},{len(parts)}")
        for topic_id, partition, offset, micro in parts:
            if partition != last_partition or topic_id != last_topic:
                last_topic, last_partition = topic_id, partition
                number = sources.setdefault((topic_id, partition), len(sources) + 1)
            pieces.append(f"{number},{offset},{micro}")
    names = " ".join([f"{topic_id}:{partition}" for topic_id, partition in sources])
    return names.encode(), f"[{','.join(pieces)}]".encode()


def as_array(op: Op) -> list[Any]:
    """One operation as `domain.buckets` and `scripts.packed` take it."""
    if isinstance(op, str):
        array: list[Any] = json.loads(f"[{op}]")
        return array
    head, parts = op
    kind, reservation_id, *rest = json.loads(f"[{head}]")
    at = 0 if kind == "s" else 2
    return [kind, reservation_id, *rest[:at], [list(part) for part in parts], *rest[at:]]
