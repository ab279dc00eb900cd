"""The HTTP side: /ping, /healthz and simple queries (curl, browsers), one session per request."""

from __future__ import annotations

import json
import os
import re
from http.server import BaseHTTPRequestHandler
from typing import ClassVar
from urllib.parse import parse_qsl, urlsplit

from meterline.local.clickhouse.engine import Engine, EngineError

__all__ = ["WebHandler"]

BODY_BYTES_MAX = 16 << 20
"""A query's text; rows come through the native protocol."""

NOT_FOUND_CODES = (60, 81)
"""Unknown table, unknown database."""

FORMAT = re.compile(r"\bformat\s+(\w+)\s*;?\s*\Z", re.IGNORECASE)


class WebHandler(BaseHTTPRequestHandler):
    """Answers one client; `engine` is set on a subclass by the server."""

    engine: ClassVar[Engine]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's signature
        """Say nothing: probes come every second."""

    def do_GET(self) -> None:
        """A probe, or a query in the address."""
        address = urlsplit(self.path)
        if address.path == "/healthz":
            self._reply(200, json.dumps({"pid": os.getpid()}).encode(), {"Content-Type": "application/json"})
        elif address.path == "/ping" or not address.query:
            self._reply(200, b"Ok.\n")
        else:
            self._query(dict(parse_qsl(address.query)), "")

    def do_POST(self) -> None:
        """A query in the body, or begun in the address and continued in the body."""
        length = int(self.headers.get("Content-Length") or 0)
        if length > BODY_BYTES_MAX:
            self._reply(413, f"At most {BODY_BYTES_MAX} bytes\n".encode())
            return
        self._query(dict(parse_qsl(urlsplit(self.path).query)), self.rfile.read(length).decode())

    def _query(self, arguments: dict[str, str], body: str) -> None:
        sql = "\n".join(part for part in (arguments.pop("query", ""), body) if part)
        output_format = arguments.pop("default_format", "TabSeparated")
        if found := FORMAT.search(sql):
            sql, output_format = sql[: found.start()], found[1]
        database = arguments.pop("database", "")
        settings = {name: value for name, value in arguments.items() if name not in ("user", "password")}
        try:
            with self.engine.session() as session:
                if database:
                    session.use(database)
                session.apply(settings)
                self._reply(200, session.query(sql, output_format))
        except EngineError as error:
            status = 404 if error.code in NOT_FOUND_CODES else 400
            text = f"Code: {error.code}. {error}\n".encode()
            self._reply(status, text, {"X-ClickHouse-Exception-Code": str(error.code)})

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "text/plain; charset=UTF-8",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
