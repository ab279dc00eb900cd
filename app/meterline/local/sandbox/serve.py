"""A sandbox from its state directory to its listening port, until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path

from aiohttp import web

from meterline.errors import UserError
from meterline.local.sandbox.books import Books
from meterline.local.sandbox.courier import Courier
from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.journal import Journal
from meterline.local.sandbox.moments import parse_moment
from meterline.local.sandbox.rules import HOUR_S
from meterline.local.sandbox.server import Server
from meterline.local.sandbox.state import State

__all__ = ["CLOCK_HELP", "GRACE_HELP", "serve"]

CLOCK_HELP = (
    "Begin at this time (ISO 8601 or Unix seconds) and stand there: time then moves by POST /_sandbox/clock "
    "only. A state directory that has a clock keeps it."
)
GRACE_HELP = "Hours an invoice stays a draft after its period has ended, 1 by default, at most 72."

SHUTDOWN_TIMEOUT_S = 5.0
"""Requests take milliseconds; after this a client that doesn't read its answer is left."""


def serve(host: str, port: int, state_dir: Path, *, clock: str | None, grace_h: float | None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        port: 0 takes any free one, which is printed.
        clock: where a new state's time begins and stands; None: the real time.
        grace_h: the account's grace period from now on; None: what it was.

    Raises:
        UserError: a port or directory that can't be used, or a setting that is none.
    """
    asyncio.run(_serve(host, port, state_dir, clock, grace_h))


async def _serve(host: str, port: int, state_dir: Path, clock: str | None, grace_h: float | None) -> None:
    listener = _listen(host, port)
    journal = Journal(state_dir, on_broken=_end_process)
    state = State()
    dropped = journal.replay(state.take)
    if dropped:
        sys.stderr.write(f"Dropped {dropped} bytes of an unfinished write; nobody was told of it.\n")
    books = Books(state, journal, time.time)
    _adjust(books, clock, grace_h)
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    runner = web.AppRunner(Server(books).application(), access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    sys.stdout.write(f"Stripe sandbox on http://{host}:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    courier = asyncio.create_task(Courier(books).run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({courier, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if courier.done():
        courier.result()  # it never returns: this raises what ended it
    courier.cancel()
    await asyncio.gather(courier, return_exceptions=True)
    await runner.cleanup()
    await journal.close()


def _adjust(books: Books, clock: str | None, grace_h: float | None) -> None:
    """What the command line says of time and grace."""
    try:
        if clock is not None and not books.state.clock_was_set:
            moment = parse_moment(clock)
            books.commit(int(moment), [books.clock.setting(moment, stands=True)])
        if grace_h is not None:
            rules = books.state.rules.changed({"invoice_grace_s": int(grace_h * HOUR_S)})
            books.commit(books.now(), [{"kind": "rules", "rules": rules.to_json()}])
    except StripeError as error:
        raise UserError(error.message) from None


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
