"""Run the sandbox: `python -m meterline.local.sandbox --port N --state-dir DIR`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path

from aiohttp import web

from meterline.errors import UserError
from meterline.local.sandbox.journal import Journal
from meterline.local.sandbox.server import Server
from meterline.local.sandbox.state import State

__all__ = ["main"]

SHUTDOWN_TIMEOUT_S = 5.0
"""Requests take milliseconds; after this a client that doesn't read its answer is left."""


def main() -> int:
    """Serve until SIGTERM or SIGINT; exit code 2 and one line for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m meterline.local.sandbox", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="0: any free port, printed at start")
    parser.add_argument("--state-dir", type=Path, required=True, help="created if absent; survives restarts")
    parser.add_argument("--host", default="127.0.0.1")
    arguments = parser.parse_args()
    try:
        asyncio.run(_serve(arguments.host, arguments.port, arguments.state_dir))
    except UserError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


async def _serve(host: str, port: int, state_dir: Path) -> None:
    listener = _listen(host, port)
    journal = Journal(state_dir, on_broken=_end_process)
    state = State()
    dropped = journal.replay(state.take)
    if dropped:
        sys.stderr.write(f"Dropped {dropped} bytes of an unfinished write; nobody was told of it.\n")
    state.forget(int(time.time()))
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    application = Server(state, journal, time.time).application()
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    sys.stdout.write(f"Stripe sandbox on http://{host}:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    await stop.wait()
    await runner.cleanup()
    await journal.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"The Stripe sandbox can't listen on {host}:{port} ({reason}). "
            "Stop what uses the port, or choose another with --port."
        ) from None


def _end_process(error: OSError) -> None:
    """End without cleaning up: memory is ahead of the disk, so no further answer may leave."""
    sys.stderr.write(
        f"Error: the sandbox's journal can't be written ({error.strerror}). State up to here is safe.\n"
    )
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
