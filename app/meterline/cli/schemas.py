"""`meterline schemas`: the offline gate of schema changes, and the schema registry for those who use one.

Exit codes: 0 all is well; 1 the registry is away; 2 a schema is wrong, or the registry refuses it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from meterline.contracts.compatibility import check_against, check_schemas
from meterline.contracts.files import schemas_dir
from meterline.contracts.registry import SchemaRegistry, subject_of
from meterline.contracts.versions import load_versions, schema_names
from meterline.errors import UserError
from meterline.settings import load_settings

__all__ = ["app"]

app = typer.Typer(help="Check the Avro schemas.", no_args_is_help=True)

Directory = Annotated[
    Path | None, typer.Option("--schemas-dir", help="Another folder of schemas.", file_okay=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def check(
    directory: Directory = None,
    against: Annotated[
        Path | None, typer.Option(help="The schemas of an earlier release.", file_okay=False, exists=True)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check compatibility of all versions, examples and golden vectors, without any service."""
    folder = directory or schemas_dir()
    problems = check_schemas(folder) + (check_against(folder, against) if against else [])
    names = schema_names(folder)
    if as_json:
        report = {"ok": not problems, "schemas": names, "problems": [asdict(problem) for problem in problems]}
        print(json.dumps(report, indent=2))
    if problems:
        lines = [f"  {problem.schema}: {problem.text}" for problem in problems]
        raise UserError("These schemas must not be published:\n" + "\n".join(lines))
    if not as_json:
        count = sum(len(load_versions(name, folder)) for name in names)
        print(f"{len(names)} schemas in {count} versions: compatible, examples and golden vectors hold.")


@app.command()
def register(as_json: AsJson = False) -> None:
    """Register all versions in the registry of METERLINE_KAFKA__REGISTRY_URL; again is harmless."""
    url = load_settings().kafka.registry_url
    if not url:
        raise UserError("No schema registry is set. Set METERLINE_KAFKA__REGISTRY_URL, or do without one.")
    registry = SchemaRegistry(url)
    rows = [
        {
            "subject": subject_of(version),
            "version": version.number,
            "id": registry.register(version),
        }
        for name in schema_names()
        for version in load_versions(name)
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("subject", "version", "id", title="Registered", title_justify="left")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
