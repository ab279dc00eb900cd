"""`meterline up | down | status | logs`: the local stack."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from meterline.errors import UserError
from meterline.local.ports import HOST, Ports
from meterline.local.service import Progress
from meterline.local.stack import READY, STOPPED, ServiceStatus, Stack, default_state_dir

__all__ = ["down", "logs", "show_progress", "status", "up"]

NOT_RUNNING = 3
"""Exit code of `status` when a service doesn't run: that of a stopped service in the Linux Standard Base."""

LOG_LINES = 50

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="METERLINE_STATE_DIR",
        help="Where its data and logs are. Default: the user's state directory.",
        file_okay=False,
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]


def up(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Start the local stack and wait until it is ready. What already runs is left alone."""
    stack = Stack(state_dir or default_state_dir())
    with show_progress(quiet=as_json) as progress:
        started = stack.up(progress)
    statuses = stack.status()
    if as_json:
        _print_json(stack, statuses, started=started)
        return
    Console().print(_table(statuses))
    if stack.ports != Ports():
        print("Its ports are moved; tell the other commands with")
        for name, value in stack.environment().items():
            print(f"  export {name}={value}")


def down(
    state_dir: StateDir = None,
    wipe: Annotated[bool, typer.Option("--wipe", help="Also remove everything it knew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop the local stack. Its state stays, for the next `up`, unless it is wiped."""
    stack = Stack(state_dir or default_state_dir())
    with show_progress(quiet=as_json) as progress:
        stopped = stack.down(wipe=wipe, on_progress=progress)
    if as_json:
        print(json.dumps({"stopped": stopped, "wiped": wipe}))
        return
    print(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing was running.")
    print("Its state is removed." if wipe else f"Its state stays in {stack.state_dir}.")


def status(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """What of the local stack runs, and where. Exit code 3 if something doesn't."""
    stack = Stack(state_dir or default_state_dir())
    statuses = stack.status()
    if as_json:
        _print_json(stack, statuses)
    else:
        Console().print(_table(statuses))
    raise typer.Exit(0 if all(service.state == READY for service in statuses) else NOT_RUNNING)


def logs(
    service: Annotated[str, typer.Argument(help="kafka, clickhouse, redis or stripe.", show_default=False)],
    state_dir: StateDir = None,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")
    ] = LOG_LINES,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the log grows.")] = False,
) -> None:
    """Print the end of a service's log."""
    stack = Stack(state_dir or default_state_dir())
    names = [known.name for known in stack.status()]
    if service not in names:
        raise UserError(f"there is no service {service!r}; there are {', '.join(names)}")
    file = stack.log_file(service)
    if not file.exists():
        raise UserError(f"{service} has no log yet: it was never started. Start it with `meterline up`")
    if follow:
        os.execvp("tail", ["tail", "-n", str(lines), "-F", str(file)])  # noqa: S606, S607 - tail follows best
    with file.open(errors="replace") as text:
        for line in deque(text, maxlen=lines):
            print(line, end="")


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """One line for each service, redrawn on a terminal; nothing but the changes elsewhere."""
    console = Console(stderr=True)
    doing: dict[str, str] = {}
    if quiet:
        yield lambda _service, _doing: None
        return
    if not console.is_terminal:

        def say(service: str, what: str) -> None:
            if doing.get(service) != what and what in {READY, STOPPED}:
                console.print(f"{service}: {what}", highlight=False)
            doing[service] = what

        yield say
        return
    with Live(console=console, transient=True, refresh_per_second=10) as live:

        def redraw(service: str, what: str) -> None:
            doing[service] = what
            rows = Table.grid(padding=(0, 1))
            for name, now in doing.items():
                mark: Any = "✓" if now in {READY, STOPPED} else Spinner("dots")
                rows.add_row(mark, name, now)
            live.update(rows)

        yield redraw


def _table(statuses: list[ServiceStatus]) -> Table:
    table = Table("service", "state", "address", "pid", "log")
    for service in statuses:
        addresses = ", ".join(f"{HOST}:{port}" for port in service.ports.values())
        table.add_row(service.name, service.state, addresses, str(service.pid or ""), str(service.log_file))
    return table


def _print_json(stack: Stack, statuses: list[ServiceStatus], **more: Any) -> None:
    services = [asdict(service) | {"log_file": str(service.log_file)} for service in statuses]
    answer = {"state_dir": str(stack.state_dir), "services": services, "environment": stack.environment()}
    print(json.dumps(answer | more, indent=2))
