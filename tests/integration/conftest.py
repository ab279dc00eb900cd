"""Fixtures of the tests that need the stack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.pipeline_books import WORKER_SETTINGS, Traffic
from tests.worker_processes import WorkerProcess, ended_in_the_end

from meterline.ledger.client import connect
from meterline.ledger.migrate import apply_migrations

COMMAND_S_MAX = 90
"""A command starts in 2 s on free cores; a busy machine takes several times that."""


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


@pytest.fixture
def meterline(stack):
    """Run a command with the settings of the workers: exit code, and all it said."""

    def run(*arguments):
        done = subprocess.run(
            [Path(sys.executable).with_name("meterline"), *map(str, arguments)],
            env=stack.process_environment() | WORKER_SETTINGS | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    return run
