"""Run the sandbox: `python -m meterline.local.sandbox --port N --state-dir DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from meterline.errors import UserError
from meterline.local.sandbox.serve import CLOCK_HELP, GRACE_HELP, serve

__all__ = ["main"]


def main() -> int:
    """Serve until SIGTERM or SIGINT; exit code 2 and one line for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m meterline.local.sandbox", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="0: any free port, printed at start")
    parser.add_argument("--state-dir", type=Path, required=True, help="created if absent; survives restarts")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--clock", help=CLOCK_HELP)
    parser.add_argument("--grace", type=float, help=GRACE_HELP)
    options = parser.parse_args()
    try:
        serve(options.host, options.port, options.state_dir, clock=options.clock, grace_h=options.grace)
    except UserError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
