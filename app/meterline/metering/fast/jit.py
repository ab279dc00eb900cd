"""How the kernels are compiled: once a machine, to a cache on disk; without one, once a process.

Kernels work on integers and bytes in numpy arrays, allocate nothing and raise nothing. Indexes are trusted:
whoever calls one has made the arrays large enough (`columns.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., Any])


# Nothing is allocated, so references need no counting: left on, each call of one kernel by another counts
# its arrays up and down, in atomic steps that took a quarter of the time of a record.
OPTIONS: Any = {"nogil": True, "_nrt": False}


def _compiler() -> Any:
    cached = njit(cache=True, **OPTIONS)
    try:
        cached(lambda: None)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(**OPTIONS)
    return cached


_compile = _compiler()


def compiled(function: F) -> F:
    """Compile at the first call with each combination of types; here there is one."""
    return cast("F", _compile(function))
