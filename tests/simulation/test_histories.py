"""Whatever happens in whatever order: every record is counted once, and all say the same credits."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from tests.simulation.histories import MeteringHistories

TestMeteringHistories = MeteringHistories.TestCase
TestMeteringHistories.settings = settings(
    max_examples=10,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
