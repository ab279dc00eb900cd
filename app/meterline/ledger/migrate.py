"""Brings the ledger's schema up to date with the numbered SQL files in `migrations/`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clickhouse_migrations.clickhouse_cluster import ClickhouseCluster
from clickhouse_migrations.exceptions import MigrationException

from meterline.errors import UserError
from meterline.ledger.client import explained
from meterline.settings import ClickHouseSettings

__all__ = ["MIGRATIONS_DIR", "Migration", "apply_migrations", "list_migrations"]

MIGRATIONS_DIR = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered SQL file and where it stands.

    `state` is `applied`, `pending`, `md5-mismatch` (the file changed after it was applied) or `unknown`
    (applied by a newer version of Meterline; `name` is then empty).
    """

    version: int
    name: str
    state: str


def list_migrations(settings: ClickHouseSettings) -> list[Migration]:
    """All migrations, oldest first. Changes nothing; a database that does not exist has all of them pending.

    Raises:
        UserError: ClickHouse is away.
    """
    names = {int(path.name.split("_")[0]): path.name for path in MIGRATIONS_DIR.glob("*.sql")}
    with _explained(settings):
        rows = _cluster(settings).status(settings.database, MIGRATIONS_DIR)
    return [Migration(row.version, names.get(row.version, ""), row.state) for row in rows]


def apply_migrations(settings: ClickHouseSettings) -> list[Migration]:
    """Create the database if it does not exist and apply what is pending.

    Every statement is CREATE ... IF NOT EXISTS or CREATE OR REPLACE, so that a run that was interrupted, or
    two at a time, end right when `migrate` runs again.

    Returns:
        The migrations this call applied, oldest first.

    Raises:
        UserError: ClickHouse is away, or the applied migrations are not those of this version.
    """
    pending = [migration for migration in list_migrations(settings) if migration.state != "applied"]
    if not pending:
        return []
    with _explained(settings):
        applied = _cluster(settings).migrate(
            settings.database, MIGRATIONS_DIR, migration_log_format="compact"
        )
    done = {migration.version for migration in applied}
    return [
        Migration(migration.version, migration.name, "applied")
        for migration in pending
        if migration.version in done
    ]


def _cluster(settings: ClickHouseSettings) -> ClickhouseCluster:
    return ClickhouseCluster(
        db_host=settings.host,
        db_port=str(settings.port),
        db_user=settings.user,
        db_password=settings.password.get_secret_value(),
        secure=settings.secure,
        connect_timeout=settings.connect_timeout_s,
        query_timeout=settings.send_receive_timeout_s,
    )


@contextmanager
def _explained(settings: ClickHouseSettings) -> Iterator[None]:
    with explained(settings):
        try:
            yield
        except MigrationException as error:
            raise UserError(
                f"The schema of database `{settings.database}` was made by another version of Meterline:"
                f" {error} Install that version or a newer one; applied migrations are never edited."
            ) from error
