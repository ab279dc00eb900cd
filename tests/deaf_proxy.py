"""A TCP proxy that can lose a server's last answer: what was asked is done, and nobody hears of it."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from meterline.local.ports import HOST

__all__ = ["DeafProxy"]

CHUNK_BYTES = 65_536


@dataclass(slots=True)
class _Connection:
    client: socket.socket
    server: socket.socket
    answers_left: int | None = None
    """Passed on before the others are lost; None: all are."""


class DeafProxy:
    """Passes bytes on between its own port and ClickHouse's native one, both ways.

    While `deaf`, an INSERT hears which columns the server expects, sends its rows, and then nothing any more.
    """

    def __init__(self, server_port: int) -> None:
        self.deaf = False
        self._server_port = server_port
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                both = _Connection(client, socket.create_connection((HOST, self._server_port)))
                for ask in (self._ask, self._answer):
                    threading.Thread(target=ask, args=(both,), daemon=True).start()

    def _ask(self, both: _Connection) -> None:
        with suppress(OSError):
            while data := both.client.recv(CHUNK_BYTES):
                if self.deaf and b"INSERT INTO" in data:
                    both.answers_left = 1
                both.server.sendall(data)
        self._close(both)

    def _answer(self, both: _Connection) -> None:
        with suppress(OSError):
            while data := both.server.recv(CHUNK_BYTES):
                if both.answers_left is None:
                    both.client.sendall(data)
                elif both.answers_left:
                    both.answers_left -= 1
                    both.client.sendall(data)
        self._close(both)

    @staticmethod
    def _close(both: _Connection) -> None:
        for end in (both.client, both.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
