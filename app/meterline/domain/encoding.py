"""Canonical bytes for hashing: a versioned tag and length-prefixed fields, so no two inputs collide.

The form is a sequence of netstrings (`<length>:<bytes>,`), the first being the tag. It is part of the public
contract: other programs reproduce it from the golden vectors.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

__all__ = ["canonical", "hash_hex", "netstring", "repeated_netstring"]

REPEATED_MAX = 16_384
"""Client ids and SKUs kept as netstrings: a worker's busy clients, in a few megabytes."""


def netstring(field: str) -> bytes:
    """One field: its length in UTF-8 bytes, a colon, the bytes, a comma."""
    data = field.encode()
    return b"%d:%b," % (len(data), data)


repeated_netstring = lru_cache(REPEATED_MAX)(netstring)
"""For what comes again and again, such as client ids and SKUs."""


def canonical(tag: str, *fields: str | int) -> bytes:
    """All fields behind a tag; integers are written in decimal."""
    return b"".join([netstring(tag), *(netstring(str(field)) for field in fields)])


def hash_hex(tag: str, *fields: str | int) -> str:
    """BLAKE2b-128 of the canonical bytes, 32 hexadecimal digits."""
    return blake2b(canonical(tag, *fields), digest_size=16).hexdigest()
