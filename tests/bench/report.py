"""How a bench ends: its table or JSON, what was missed and, by the exit code, whether all is well."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console

__all__ = ["conclude"]


def conclude(
    report: dict[str, Any], missed: Sequence[str], show: Callable[[dict[str, Any]], None], *, as_json: bool
) -> NoReturn:
    """Print, and end with 1 if a target was missed or something is `wrong`, else with 0.

    Args:
        report: what `--json` prints, `missed` added.
        show: prints it for people.
    """
    if as_json:
        typer.echo(json.dumps(report | {"missed": missed}, indent=2))
    else:
        show(report)
        for line in missed:
            Console().print(f"Missed: {line}", markup=False)
    raise typer.Exit(1 if missed or report["wrong"] else 0)
