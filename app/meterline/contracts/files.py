"""Where the contracts lie: inside an installed wheel, or at the top of a source checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["schemas_dir", "topics_dir"]

_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parents[2]


def schemas_dir() -> Path:
    """The folder of Avro schemas, their examples and the golden vectors."""
    return _find("schemas")


def topics_dir() -> Path:
    """The folder of topic descriptions."""
    return _find("topics")


def _find(name: str) -> Path:
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _CHECKOUT / name
