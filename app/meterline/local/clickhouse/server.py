"""The server process: two listeners over one engine, until SIGTERM."""

from __future__ import annotations

import fcntl
import signal
import socket
import socketserver
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from meterline.errors import UserError
from meterline.local.clickhouse.engine import Engine
from meterline.local.clickhouse.native import Client
from meterline.local.clickhouse.watcher import Watcher
from meterline.local.clickhouse.web import WebHandler

__all__ = ["serve"]

HOST = "127.0.0.1"
"""Loopback only: there are no users and no passwords."""

BACKLOG = 128
"""Clients that connect at the same moment, a whole test session's worth."""


class NativeServer(socketserver.ThreadingTCPServer):
    """A thread per client."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, port: int, engine: Engine, watcher: Watcher) -> None:
        self._engine = engine
        self._watcher = watcher
        super().__init__((HOST, port), socketserver.BaseRequestHandler)

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - base class
        """Serve one client; that it leaves at any moment is no error."""
        # Answers are small writes: with Nagle's algorithm each query waits 40 ms for a delayed ACK.
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(EOFError, OSError), self._engine.session() as session:
            Client(request, session, self._watcher).serve()


def serve(tcp_port: int, http_port: int, data_dir: Path) -> None:
    """Serve `data_dir` until SIGTERM or SIGINT.

    What was acknowledged is on disk, so the end needs no ceremony: open connections are cut.

    Raises:
        UserError: another server has this directory, or a port is taken.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "meterline.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another server works in {data_dir}; stop it first") from None
        engine = Engine(data_dir / "data")
        watcher = Watcher(engine)
        web_handler = type("EngineWebHandler", (WebHandler,), {"engine": engine})
        try:
            native = NativeServer(tcp_port, engine, watcher)
            web = ThreadingHTTPServer((HOST, http_port), web_handler)
        except OSError as error:
            raise UserError(f"Can't listen on {HOST}, port {tcp_port} or {http_port}: {error}") from None
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        for work in (watcher.run, native.serve_forever, web.serve_forever):
            threading.Thread(target=work, daemon=True).start()
        stop.wait()
