"""Ends that no metric of the process itself could tell: counted by the next process of the folder."""

from __future__ import annotations

import subprocess
import sys

from prometheus_client import REGISTRY

from meterline.streaming.fatal import EXIT_FENCED_OR_UNKNOWN, remember_exits

DIES = """
import sys
from pathlib import Path
from meterline.streaming.fatal import die, remember_exits
remember_exits(Path(sys.argv[1]))
die("fenced")
"""


def told():
    return REGISTRY.get_sample_value("meterline_fatal_exits_total")


def test_fatal_exits_are_counted_by_the_next_process(tmp_path):
    """A worker that is fenced again and again is seen, although it never lives to say so."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", DIES, tmp_path], capture_output=True, check=False)
        assert done.returncode == EXIT_FENCED_OR_UNKNOWN, done.stderr
    before = told()

    remember_exits(tmp_path)

    assert told() == before + 2


def test_a_folder_that_cannot_be_written_costs_the_number_only(tmp_path):
    """The work goes on, and the end is the same."""
    blocked = tmp_path / "file"
    blocked.touch()
    done = subprocess.run([sys.executable, "-c", DIES, blocked / "folder"], capture_output=True, check=False)

    assert done.returncode == EXIT_FENCED_OR_UNKNOWN
    assert b"fenced" in done.stderr + done.stdout
