"""Fixtures of the tests that need the stack."""

from __future__ import annotations

import pytest
from tests.pipeline_books import WORKER_SETTINGS, Traffic
from tests.worker_processes import WorkerProcess, ended_in_the_end

from meterline.ledger.client import connect
from meterline.ledger.migrate import apply_migrations


@pytest.fixture
def database(settings, unique):
    """ClickHouse settings with an empty database of the test's own; dropped afterwards."""
    own = settings.clickhouse.model_copy(update={"database": unique("test").replace("-", "_")})
    admin = connect(settings.clickhouse)
    admin.execute(f"CREATE DATABASE {own.database}")
    yield own
    admin.execute(f"DROP DATABASE {own.database}")
    admin.disconnect()


@pytest.fixture
def ledger(database):
    """ClickHouse settings of a migrated ledger of the test's own."""
    apply_migrations(database)
    return database


@pytest.fixture(scope="module")
def traffic(stack):
    """What clients do, on the stack of the module: its own, where the books are to be compared."""
    traffic = Traffic(stack)
    yield traffic
    traffic.close()


@pytest.fixture
def worker(stack, tmp_path):
    """A metering worker, not started; nothing of it is left in the end."""
    made = WorkerProcess("metering", stack.process_environment() | WORKER_SETTINGS, tmp_path)
    with ended_in_the_end(made):
        yield made
