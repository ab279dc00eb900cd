"""The fast path: whole record batches through compiled kernels. Needs the extra `fast`.

bytes of batches -> scan -> hashing -> fold -> columns for ClickHouse, sums for the meter
whatever is not ordinary                    -> the plain meter, record by record
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

__all__ = ["load_fast_path"]


def load_fast_path() -> ModuleType | None:
    """The module that makes fast meters, or None where the extra is not installed."""
    if find_spec("numba") is None:
        return None
    from meterline.metering.fast import factory  # noqa: PLC0415 - imports numba

    return factory
