"""Whatever happens in whatever order: every record is counted once, and all say the same credits."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from tests.simulation.histories import MeteringHistories

EXAMPLES = 200
"""Ten seconds; each safeguard that was taken out was missed within 150. `make simulate` takes thousands."""

TestMeteringHistories = MeteringHistories.TestCase
TestMeteringHistories.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
