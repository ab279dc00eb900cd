"""`meterline demo`: real usage through the whole pipeline, every credit accounted for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from meterline.cli.stack import show_progress
from meterline.demo.run import Outcome, open_stack, run
from meterline.demo.screen import Screen
from meterline.errors import UserError
from meterline.local.stack import default_state_dir

__all__ = ["demo"]

RECEIPT_LINES_SHOWN = 12
NOT_CONSERVED = 1
INTERRUPTED = 130
"""The shell's exit code for a program ended by Ctrl-C."""


def demo(
    traces: Annotated[
        Path | None,
        typer.Option(
            envvar="METERLINE_TRACES",
            help="Folder of the two Azure LLM traces. Default: ../shared/data, or a generated sample.",
            show_default=False,
            file_okay=False,
        ),
    ] = None,
    chaos: Annotated[bool, typer.Option("--chaos", help="Kill workers five times on the way.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running at the end.")] = False,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where its data is. Default: beside the stack's.", show_default=False)
    ] = None,
) -> None:
    """Real usage through the whole pipeline, every credit accounted for."""
    folder = state_dir or default_state_dir().with_name("demo")
    screen = Screen()
    try:
        with open_stack(folder, show_progress, keep=keep) as stack:
            outcome = run(stack, traces or _found_traces(), screen, chaos=chaos)
            _report(screen, outcome)
            if keep:
                settings = "".join(
                    f"\n  export {name}={value}" for name, value in stack.environment().items()
                )
                screen.say(f"The stack is running. Tell other commands where:{settings}")
                screen.say(f"Stop it with: meterline down --state-dir {folder}")
    except KeyboardInterrupt:
        screen.say("Interrupted: workers and stack are stopped.")
        raise typer.Exit(INTERRUPTED) from None
    screen.say(outcome.accounts.summary)
    raise typer.Exit(NOT_CONSERVED if outcome.accounts.problems else 0)


def _found_traces() -> Path | None:
    """Beside the checkout this runs from, if it does."""
    for start in (Path.cwd(), Path(__file__).parents[3]):
        folder = start.parent / "shared" / "data"
        if (folder / "azure_llm_2023_code.csv").is_file():
            return folder
    return None


def _report(screen: Screen, outcome: Outcome) -> None:
    accounts = outcome.accounts
    screen.clients(accounts)
    screen.credit_buckets(accounts)
    screen.dead_letters(accounts)
    client = next(iter(accounts.clients))
    command = [sys.executable, "-m", "meterline", "receipt", client]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if shown.returncode:
        raise UserError(f"the receipt of {client} can't be read: {shown.stderr.strip()}")
    for line in shown.stdout.splitlines()[:RECEIPT_LINES_SHOWN]:
        screen.say(line)
    screen.say("...")
    if outcome.replayed is not None:
        screen.say(f"Replayed offsets: {outcome.replayed}")
    screen.trial(outcome.trial, outcome.worked, accounts.clients[outcome.trial])
    screen.problems(accounts.problems)
