"""`meterline sandbox`: a Stripe of one's own, with a clock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meterline.local.ports import HOST, Ports
from meterline.local.sandbox.serve import CLOCK_HELP, GRACE_HELP, serve
from meterline.local.stack import default_state_dir

__all__ = ["sandbox"]


def sandbox(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free port, printed.")] = Ports().stripe,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="What it knows; survives restarts. Default: beside the stack's.",
            show_default=False,
            file_okay=False,
        ),
    ] = None,
    clock: Annotated[str | None, typer.Option(help=CLOCK_HELP, show_default=False)] = None,
    grace: Annotated[float | None, typer.Option(min=0, max=72, help=GRACE_HELP, show_default=False)] = None,
    host: Annotated[str, typer.Option(help="Where it listens. It has no secrets to keep.")] = HOST,
) -> None:
    """Run a Stripe sandbox until Ctrl-C: meters, subscriptions and invoices, with a clock to move.

    It speaks Stripe's API on loopback, so that Stripe's own libraries work against it, under the key
    sk_test_meterline_sandbox and no other. `meterline up` runs one too; this one is for tests and tools.

    Move its time, with everything that follows from it (period ends, final invoices, forgotten identifiers):

        curl -u sk_test_meterline_sandbox: http://127.0.0.1:12111/_sandbox/clock -d '{"advance_s": 86400}'

    docs/stripe.md lists what it serves, its rules and its faults.
    """
    folder = state_dir or default_state_dir().with_name("sandbox")
    serve(host, port, folder, clock=clock, grace_h=grace)
