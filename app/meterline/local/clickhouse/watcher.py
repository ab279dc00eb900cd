"""Notices that a client cancels or leaves while its query runs, and kills the query."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from meterline.local.clickhouse.engine import Engine, Session

__all__ = ["Watch", "Watcher", "peek"]

POLL_INTERVAL_S = 0.1
"""A cancelled query runs on for at most this long."""

CANCEL_PACKET = b"\x03"


@dataclass(slots=True)
class Watch:
    """One running query."""

    peer: socket.socket
    session: Session
    cancelled: bool = False


class Watcher:
    """One thread for all clients: a thread that waits for the engine can't read its socket.

    It may watch only while nobody reads the socket. Of an insert's data it would take a byte for a cancel.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._watches: dict[int, Watch] = {}

    @contextmanager
    def watching(self, peer: socket.socket, session: Session) -> Iterator[Watch]:
        """Watch while a query runs. When this ends no kill is under way that could hit the next query."""
        watch = Watch(peer, session)
        with self._lock:
            self._watches[peer.fileno()] = watch
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.pop(peer.fileno(), None)

    def run(self) -> None:
        """The thread's work, for ever."""
        while True:
            time.sleep(POLL_INTERVAL_S)
            with self._lock:
                self._kill_cancelled()

    def _kill_cancelled(self) -> None:
        readable = select.poll()
        for number, watch in self._watches.items():
            if not watch.cancelled:
                readable.register(number, select.POLLIN)
        for number, _ in readable.poll(0):
            watch = self._watches[number]
            if peek(watch.peer) in (b"", CANCEL_PACKET):
                watch.cancelled = True
                self._engine.kill(watch.session)


def peek(peer: socket.socket) -> bytes | None:
    """The next byte without taking it; empty when the client is gone, None when there is nothing.

    Never waits: it would with the lock in hand, and every client's query with it.
    """
    try:
        return peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""
