"""A proof as its short version in the suite runs it: the whole command, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["said_by_proof"]

ROOT = Path(__file__).parents[1]


def said_by_proof(name, *options, seconds):
    """What `python -m tests.proof.NAME` prints; it must end well, within so many seconds."""
    said = subprocess.run(
        [sys.executable, "-m", f"tests.proof.{name}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout
