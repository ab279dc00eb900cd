"""Fixtures of the tests that need the stack."""

from __future__ import annotations

import pytest

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
