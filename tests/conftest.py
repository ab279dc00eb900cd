"""Fixtures for every test: one stack for the session, and names nobody else uses."""

from __future__ import annotations

import signal
import uuid

import pytest
from tests.stacks import chosen_kind, running_stack


def pytest_report_header():
    return f"stack: {chosen_kind()} (METERLINE_TEST_STACK)"


@pytest.fixture(scope="session")
def stack():
    """Kafka, ClickHouse, Redis and the Stripe sandbox, topics and migrations applied."""

    def interrupt(*_):
        raise KeyboardInterrupt

    # Its processes outlive us by design: being told to end must take them along, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with running_stack(chosen_kind()) as running:
            yield running
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def settings(stack):
    """The settings that point at the stack: its shared topics and its shared ledger."""
    return stack.settings


@pytest.fixture
def unique():
    """Makes names that no other test uses: `unique("client")`."""
    return lambda prefix: f"{prefix}-{uuid.uuid4().hex[:12]}"
