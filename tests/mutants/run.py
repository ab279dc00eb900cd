"""Run one mutant: copy, change, test, judge."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tests.mutants.mutant import Mutant, StaleMutantError

__all__ = ["NO_OP", "ROOT", "Result", "Verdict", "copy_of", "end_all", "run"]

ROOT = Path(__file__).parents[2]
STOP_S_MAX = 60.0
"""After the time limit: the fixtures stop what they started."""
SKIPPED = ("__pycache__", "*.egg-info")
NO_OP = "no-op"

_running: set[subprocess.Popen] = set()


class Verdict(StrEnum):
    """How it ended."""

    KILLED = "killed"
    SURVIVED = "SURVIVED"
    INVALID = "INVALID"
    """Red, but not by an assertion about amounts; or no result at all. Nothing is shown by it."""
    GREEN = "green"
    RED = "RED"
    """The unchanged code (no-op) failed: no kill of this run means anything."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one mutant came to."""

    name: str
    verdict: Verdict
    seconds: float
    reds: Sequence[dict] = field(default_factory=list)
    """Notes of `witness`, those that speak of amounts first."""
    trouble: str = ""
    """Why it is invalid."""


def copy_of(root: Path, target: Path) -> None:
    """All that the tests read: everything at the top but hidden files and folders."""
    target.mkdir()
    for source in root.iterdir():
        if source.name.startswith("."):
            continue
        if source.is_dir():
            shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns(*SKIPPED))
        else:
            shutil.copy2(source, target / source.name)


def run(mutant: Mutant, original: Path) -> Result:
    """Mutate a copy of `original` and run the mutant's tests in it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"meterline-mutant-{mutant.name}-") as folder:
        copy, witness = Path(folder) / "copy", Path(folder) / "witness.jsonl"
        copy_of(original, copy)
        try:
            mutant.apply(copy)
        except StaleMutantError as error:
            return Result(mutant.name, Verdict.INVALID, 0.0, trouble=str(error))
        code, output = _pytest(copy, witness, mutant)
        text = witness.read_text("utf-8") if witness.is_file() else ""
    reds = [json.loads(line) for line in text.splitlines()]
    reds.sort(key=lambda red: not _speaks(mutant, red))
    verdict, trouble = _judge(mutant, code, reds, output)
    return Result(mutant.name, verdict, time.monotonic() - began, reds, trouble)


def _judge(mutant: Mutant, code: int | None, reds: list[dict], output: str) -> tuple[Verdict, str]:
    tail = "\n".join(output.splitlines()[-15:])
    if code is None:
        return Verdict.INVALID, f"not done within {mutant.limit_s:.0f} s\n{tail}"
    if mutant.name == NO_OP:
        return (Verdict.GREEN, "") if code == 0 else (Verdict.RED, tail)
    if code == 0:
        return Verdict.SURVIVED, ""
    if code != 1:  # usage, collection, internal error, nothing collected
        return Verdict.INVALID, f"pytest ended with {code}\n{tail}"
    if any(_speaks(mutant, red) for red in reds):
        return Verdict.KILLED, ""
    lines = [f"{red['test']}: {red['error']} at {red['place']}: {red['message'][:300]}" for red in reds]
    return Verdict.INVALID, "\n".join([f"no red assertion speaks of {mutant.speaks_of!r}", *lines])


def _speaks(mutant: Mutant, red: dict) -> bool:
    return red["assertion"] and bool(re.search(mutant.speaks_of, f"{red['line']}\n{red['message']}"))


def _pytest(copy: Path, witness: Path, mutant: Mutant) -> tuple[int | None, str]:
    """The tests in a process (group) of their own. Exit code, None after the time limit; and the output."""
    log = copy.parent / "output.txt"
    plugins = ["-p", "tests.mutants.witness", "-p", "no:cacheprovider", f"--witness={witness}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--tb=short", *plugins, *mutant.tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(copy / "app"), str(copy)])},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process)
        try:
            code = process.wait(mutant.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
            _running.discard(process)
    return code, log.read_text("utf-8", errors="replace")


def end_all() -> None:
    """Interrupt what runs; its fixtures stop what they started."""
    for process in list(_running):
        process.send_signal(signal.SIGINT)


def _end(process: subprocess.Popen) -> None:
    """As Ctrl-C does, so that fixtures stop their stack; then for good."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
