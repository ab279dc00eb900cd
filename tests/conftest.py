"""Fixtures for every test: one stack for the session, and names nobody else uses."""

from __future__ import annotations

import signal
import uuid

import pytest
from tests.stacks import chosen_kind, running_stack
from tests.worker_processes import logs_written_since

BEGAN = pytest.StashKey[float]()
"""When a test's first phase began, in seconds of the wall clock."""


def pytest_report_header():
    return f"stack: {chosen_kind()} (METERLINE_TEST_STACK)"


def pytest_collection_modifyitems(items):
    """Modules with the most time to themselves come first.

    Two processes share the modules (`make test`): one begun last would run alone.
    """
    patience = {item.path: 0 for item in items}
    for item in items:
        if (limit := item.get_closest_marker("timeout")) is not None:
            patience[item.path] = max(patience[item.path], limit.args[0])
    items.sort(key=lambda item: -patience[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows what the workers said in its time, and where they said it."""
    report = yield
    began = item.stash.setdefault(BEGAN, call.start)
    if report.failed and (said := logs_written_since(began)):
        report.sections.append(("workers' logs", said))
    return report


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
