"""`meterline`: the table of commands. Each is imported only when it is used, so `--help` needs no extra."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from meterline import __version__
from meterline.errors import MeterlineError, UserError
from meterline.logs import configure_logs

__all__ = ["main"]

COMMANDS: dict[str, tuple[str, str]] = {
    # command: (module in meterline.cli, first line of its help)
    "up": ("stack:up", "Start the local stack: Kafka, Valkey, ClickHouse's engine, Stripe sandbox."),
    "down": ("stack:down", "Stop the local stack; --wipe also removes its state."),
    "status": ("stack:status", "What of the local stack runs, and where."),
    "logs": ("stack:logs", "Print a service's log."),
    "demo": ("demo:demo", "Real usage through the whole pipeline, every credit accounted for."),
    "sandbox": ("sandbox:sandbox", "Run a Stripe sandbox of its own, with a clock to move."),
    "topics": ("topics:app", "Plan and apply the Kafka topics."),
    "schemas": ("schemas:app", "Check the Avro schemas."),
    "migrate": ("migrate:migrate", "Bring the ledger's ClickHouse schema up to date."),
    "worker": ("worker:app", "Run a worker: metering or billing."),
    "publish": ("publish:publish", "Publish usage events from a CSV or JSON-lines file."),
    "clients": ("clients:app", "The client registry: set and list."),
    "lag": ("lag:lag", "How far metering is behind; --account: what became of every offset."),
    "usage": ("usage:usage", "A client's usage by hour and SKU."),
    "receipt": ("receipt:receipt", "Every task a client pays for, and how it reached Stripe."),
    "billing": ("billing:app", "What billing knows, holds and has sent."),
    "quota": ("quota:app", "Credit buckets: give credits, read them, check them."),
}


class LazyGroup(TyperGroup):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        """All commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - click's signature
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(f"meterline.cli.{module_name}"), attribute)
        if not isinstance(command, typer.Typer):
            single = typer.Typer(add_completion=False)
            single.command(cmd_name)(command)
            command = single
        return typer.main.get_command(command)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - click's signature
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meterline {__version__}")
        raise typer.Exit


@app.callback()
def cli(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Meterline: usage metering and billing that loses nothing and counts nothing twice."""


def main() -> None:
    """Entry point. A user's mistake is one clear message and exit code 2, never a traceback."""
    configure_logs("critical")  # a command says itself what is wrong; workers choose their own level
    try:
        app()
    except MeterlineError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
