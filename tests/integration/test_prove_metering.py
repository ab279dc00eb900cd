"""The proof of metering in short: workers die at every step, servers too, and every credit is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.proof.worker_kills import ANYWHERE, TAKE_OVER, steps_of

from meterline import metering

ROOT = Path(__file__).parents[2]
RUN_S_MAX = 280

pytestmark = [pytest.mark.stack, pytest.mark.timeout(RUN_S_MAX + 20)]


def test_nothing_is_lost_or_counted_twice_whatever_is_killed():
    """`python -m tests.proof.metering` with fewer events and kills; what is planted is found, exactly."""
    said = subprocess.run(
        [sys.executable, "-m", "tests.proof.metering", "--events", "60000", "--kills", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )

    assert said.returncode == 0, said.stdout + said.stderr
    kills = dict(re.findall(r"^  (\S+) (\d+)$", said.stdout, re.MULTILINE))
    assert kills.keys() == {*steps_of(metering), ANYWHERE, TAKE_OVER}
    assert min(map(int, kills.values())) > 0
    assert "services killed: kafka 1 times, clickhouse 1 times" in said.stdout
    replayed = re.search(r"^([\d,]+) offsets read again", said.stdout, re.MULTILINE)
    assert replayed[1] != "0"
    assert "\nlost=0 duplicated=0 credit_difference=0\n" in said.stdout
    assert "\nplanted and reported exactly: lost=7 duplicated=7 credit_difference=" in said.stdout
