"""The proof of quotas in short: processes race for credits, are killed and stalled, and nothing is lost."""

from __future__ import annotations

import pytest
from tests.proof_in_short import said_by_proof
from tests.stacks import chosen_kind

RUN_S_MAX = 280

pytestmark = [pytest.mark.stack, pytest.mark.timeout(RUN_S_MAX + 20)]


def test_credits_are_conserved_whatever_is_killed():
    """`python -m tests.proof.quota --short`: the races of `make prove-quota` with fewer tasks.

    Punctual tasks leave no term of the bound; with leases whose holders are stopped it holds with its terms.
    """
    if chosen_kind() != "local":
        pytest.skip("the proof kills processes of the local stack")
    said = said_by_proof("quota", "--short", seconds=RUN_S_MAX)

    punctual, leases = (line for line in said.splitlines() if " quota: conserved (" in line)
    terms = "late=0 above=0 unreserved=0 leases=0 early=0 rollover=0"
    assert (punctual.split(":")[0], leases.split(":")[0]) == ("punctual", "leases")
    if "machine_too_slow" not in said:
        assert f"overshoot=0 {terms}" in punctual
