"""`meterline migrate`: the ledger's schema, brought up to date."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from meterline.ledger.migrate import apply_migrations, list_migrations
from meterline.settings import load_settings

__all__ = ["migrate"]


def migrate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what is pending, change nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """Bring the ledger's ClickHouse schema up to date. Safe to run again at any time."""
    settings = load_settings().clickhouse
    applied = [] if dry_run else apply_migrations(settings)
    migrations = list_migrations(settings)
    if as_json:
        answer = {
            "database": settings.database,
            "applied_now": [migration.version for migration in applied],
            "migrations": [dataclasses.asdict(migration) for migration in migrations],
        }
        typer.echo(json.dumps(answer))
        return
    table = Table("version", "migration", "state", title=f"{settings.database} on {settings.host}")
    now = {migration.version for migration in applied}
    for migration in migrations:
        state = "applied now" if migration.version in now else migration.state
        table.add_row(f"{migration.version:03d}", migration.name, state)
    Console().print(table)
