"""Memory of a worker that takes in megabytes at a time and lets go of them again."""

from __future__ import annotations

import ctypes

__all__ = ["keep_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

BLOCK_BYTES_MAX = 32 << 20
"""Larger blocks are the system's own to give and take: the most that glibc allows."""

KEPT_BYTES_MAX = 256 << 20
"""Free memory beyond this goes back to the system. A worker that is behind turns over less in a flush."""


def keep_memory() -> None:
    """Let free memory wait for the next fetch and flush, which are about as large as the one before.

    As it is, glibc gives each megabyte back to the system at once, which has to hand it out again page by
    page, cleared: a sixth of a fast worker's time. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES_MAX)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES_MAX)
