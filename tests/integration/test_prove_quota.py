"""The proof of quotas in short: processes race for credits, are killed and stalled, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.stacks import chosen_kind

ROOT = Path(__file__).parents[2]
RUN_S_MAX = 280

pytestmark = [pytest.mark.stack, pytest.mark.timeout(RUN_S_MAX + 20)]


def test_credits_are_conserved_whatever_is_killed():
    """`python -m tests.proof.quota --short`: the races of `make prove-quota` with fewer tasks.

    Punctual tasks leave no term of the bound; with leases whose holders are stopped it holds with its terms.
    """
    if chosen_kind() != "local":
        pytest.skip("the proof kills processes of the local stack")
    said = subprocess.run(
        [sys.executable, "-m", "tests.proof.quota", "--short"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )

    assert said.returncode == 0, said.stdout + said.stderr
    punctual, leases = (line for line in said.stdout.splitlines() if " quota: conserved (" in line)
    terms = "late=0 above=0 unreserved=0 leases=0 early=0 rollover=0"
    assert (punctual.split(":")[0], leases.split(":")[0]) == ("punctual", "leases")
    if "machine_too_slow" not in said.stdout:
        assert f"overshoot=0 {terms}" in punctual
