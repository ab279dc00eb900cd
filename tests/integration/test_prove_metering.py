"""The proof of metering in short: workers die at every step, servers too, and every credit is there."""

from __future__ import annotations

import re

import pytest
from tests.proof.worker_kills import ANYWHERE, TAKE_OVER, steps_of
from tests.proof_in_short import said_by_proof

from meterline import metering

RUN_S_MAX = 280

pytestmark = [pytest.mark.stack, pytest.mark.timeout(RUN_S_MAX + 20)]


def test_nothing_is_lost_or_counted_twice_whatever_is_killed():
    """`python -m tests.proof.metering` with fewer events and kills; what is planted is found, exactly."""
    said = said_by_proof("metering", "--events", "60000", "--kills", "20", seconds=RUN_S_MAX)

    kills = dict(re.findall(r"^  (\S+) (\d+)$", said, re.MULTILINE))
    assert kills.keys() == {*steps_of(metering), ANYWHERE, TAKE_OVER}
    assert min(map(int, kills.values())) > 0
    assert "services killed: kafka 1 times, clickhouse 1 times" in said
    replayed = re.search(r"^([\d,]+) offsets read again", said, re.MULTILINE)
    assert replayed[1] != "0"
    assert "\nlost=0 duplicated=0 credit_difference=0\n" in said
    assert "\nplanted and reported exactly: lost=7 duplicated=7 credit_difference=" in said
