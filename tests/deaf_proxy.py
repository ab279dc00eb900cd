"""A TCP proxy that can swallow a server's answers: what was asked is done, and nobody hears of it."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self

from meterline.local.ports import HOST

__all__ = ["DeafProxy"]

CHUNK_BYTES = 65_536


class DeafProxy:
    """Passes bytes on between its own port and a server's, both ways.

    Attributes:
        swallowed: bytes of answers that were not passed on.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self.swallowed = 0
        self._deaf = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def swallow_answers(self, deaf: bool) -> None:  # noqa: FBT001 - on and off
        """From now on, on every connection."""
        self._deaf = deaf

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self._server_port))
                for source, target, is_answer in ((client, server, False), (server, client, True)):
                    threading.Thread(
                        target=self._pass_on, args=(source, target, is_answer), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:  # noqa: FBT001
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if is_answer and self._deaf:
                    self.swallowed += len(data)
                else:
                    target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
