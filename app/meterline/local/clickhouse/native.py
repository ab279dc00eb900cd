"""One client of ClickHouse's native TCP protocol, served until it leaves.

The revision is the highest whose blocks are byte for byte the Native format: blocks pass between client and
engine untouched, only their frame is read. Users, TLS, compression and external tables are left out.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain

from meterline.local.clickhouse.blocks import header_block, header_of, skip_block, split_blocks
from meterline.local.clickhouse.columns import UnknownTypeError
from meterline.local.clickhouse.engine import EngineError, Session
from meterline.local.clickhouse.watcher import Watcher
from meterline.local.clickhouse.wire import WireReader, int32, string, varint

__all__ = ["Client"]

REVISION = 54_429
"""The first with settings as strings; the later ones add fields to frames and columns that we'd only skip."""

VERSION = (26, 9, 0)

HELLO, QUERY, DATA, CANCEL, PING = 0, 1, 2, 3, 4
SERVER_HELLO, SERVER_DATA, SERVER_EXCEPTION, SERVER_PONG, SERVER_END = 0, 1, 2, 4, 5

NO_SUCH_COLUMN = 16
NOT_IMPLEMENTED = 48

BLOCK_INFO = bytes((1, 0, 2, 0xFF, 0xFF, 0xFF, 0xFF, 0))
"""Field 1, is_overflows: no; field 2, bucket_num: -1; end."""

IGNORED = r"(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*"
NAME = r"(?:`[^`]*`|\"[^\"]*\"|\w+)"
INSERT = re.compile(
    IGNORED + rf"(?P<statement>insert\s+into\s+(?:table\s+)?(?P<table>{NAME}(?:\.{NAME})?)\s*"
    r"(?:\((?P<columns>[^)]*)\))?\s*(?:settings\s.*?)?)\s*(?:values|format\s+\w+)\s*;?\s*",
    re.IGNORECASE | re.DOTALL,
)
"""An INSERT whose rows follow as blocks. One with rows in its text doesn't match: the engine parses it."""
SELECT = re.compile(IGNORED + r"\(*" + IGNORED + r"(?:select|with)\b", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Query:
    """What a client asks for."""

    sql: str
    settings: dict[str, str]


class Client:
    """The conversation with one client."""

    def __init__(self, peer: socket.socket, session: Session, watcher: Watcher) -> None:
        self._peer = peer
        self._session = session
        self._watcher = watcher
        self._reader = WireReader(peer.recv)

    def serve(self) -> None:
        """Answer packets until the client leaves.

        Raises:
            EOFError, OSError: the client is gone, or spoke something else.
        """
        answers = {HELLO: self._hello, QUERY: self._query, CANCEL: self._cancel, PING: self._ping}
        while True:
            self._reader.forget()
            packet = self._reader.varint()
            if packet not in answers:
                raise ConnectionError(f"packet {packet} where a query may start")
            answers[packet]()

    def _cancel(self) -> None:
        """The query had ended already."""

    def _ping(self) -> None:
        self._peer.sendall(varint(SERVER_PONG))

    def _hello(self) -> None:
        reader = self._reader
        reader.string()
        for _ in range(3):
            reader.varint()
        database = reader.string()
        reader.string()
        reader.string()
        try:
            if database not in ("", "default"):
                self._session.use(database)
        except EngineError as error:
            self._send_exception(error)
            raise ConnectionError("no such database") from None
        major, minor, patch = VERSION
        self._peer.sendall(
            varint(SERVER_HELLO)
            + string("ClickHouse")
            + varint(major)
            + varint(minor)
            + varint(REVISION)
            + string("UTC")
            + string("meterline")
            + varint(patch)
        )

    def _query(self) -> None:
        try:
            query = self._read_query()
            self._session.apply(query.settings)
            insert = INSERT.fullmatch(query.sql)
            work = self._receive_insert(insert) if insert else partial(self._run, query.sql)
            with self._watcher.watching(self._peer, self._session) as watch:
                try:
                    work()
                except EngineError:
                    if not watch.cancelled:
                        raise
            self._peer.sendall(varint(SERVER_END))
        except EngineError as error:
            self._send_exception(error)
        except UnknownTypeError as error:
            self._send_exception(EngineError(NOT_IMPLEMENTED, f"Inserting the type {error} is not supported"))
            raise ConnectionError("the rest of the insert can't be read") from None

    def _run(self, sql: str) -> None:
        if SELECT.match(sql):
            self._select(sql)
        else:
            self._send_result(split_blocks(self._session.query(sql)))

    def _select(self, sql: str) -> None:
        """Of an empty result names and types have to be asked for, which costs as much as many a query."""
        # Closed before its session is, whatever ends this: an open one blocks the engine for good.
        with closing(self._session.stream(sql)) as blocks:
            is_empty = not self._send_result(blocks)
        if is_empty:
            self._send_block(header_block(self._session.header(f"({sql.strip().rstrip(';')})")))

    def _send_result(self, blocks: Iterator[bytes]) -> bool:
        """Names and types first, as from a server, in a block without rows. False: there was no block."""
        if (first := next(blocks, None)) is None:
            return False
        for block in chain((header_of(first), first), blocks):
            self._send_block(block)
        return True

    def _receive_insert(self, parsed: re.Match[str]) -> Callable[[], None]:
        """Send the header, receive blocks until the empty one; what hands them to the engine as they are."""
        table = parsed["table"]
        types = dict(self._session.header(table))
        names = [name.strip().strip('`"') for name in (parsed["columns"] or "").split(",") if name.strip()]
        if unknown := [name for name in names if name not in types]:
            raise EngineError(NO_SUCH_COLUMN, f"DB::Exception: No such column {unknown[0]} in table {table}")
        names = names or list(types)
        self._send_block(header_block([(name, types[name]) for name in names]))
        blocks = list(iter(self._receive_block, b""))
        columns = [(name, types[name]) for name in names]
        return partial(self._session.insert, table, columns, blocks)

    def _read_query(self) -> Query:
        reader = self._reader
        reader.string()  # query id: the engine gives its own
        reader.byte()  # kind
        for _ in range(3):
            reader.string()  # initial user, query id, address
        reader.byte()  # interface
        for _ in range(3):
            reader.string()  # user, host, program
        for _ in range(3):
            reader.varint()  # version
        reader.string()  # quota key
        reader.varint()  # patch
        settings = {}
        while name := reader.string():
            reader.varint()  # flags
            settings[name] = reader.string()
        reader.varint()  # stage
        compressed = reader.varint()
        sql = reader.string()
        if compressed:
            self._send_exception(EngineError(NOT_IMPLEMENTED, "Connect without compression"))
            raise ConnectionError("compressed blocks can't be read")
        if self._receive_block():
            while self._receive_block():
                pass
            raise EngineError(NOT_IMPLEMENTED, "External tables are not supported")
        return Query(sql, settings)

    def _receive_block(self) -> bytes:
        """The next data packet's block in Native format; nothing when it is empty."""
        reader = self._reader
        reader.forget()
        if (packet := reader.varint()) != DATA:
            raise ConnectionError(f"packet {packet} where a block is due")
        reader.string()  # table
        reader.skip(len(BLOCK_INFO))
        start = reader.mark()
        return reader.since(start) if skip_block(reader) else b""

    def _send_block(self, block: bytes) -> None:
        self._peer.sendall(varint(SERVER_DATA) + string("") + BLOCK_INFO + block)

    def _send_exception(self, error: EngineError) -> None:
        self._peer.sendall(
            varint(SERVER_EXCEPTION)
            + int32(error.code)
            + string("DB::Exception")
            + string(str(error))
            + string("")  # stack trace
            + b"\0"  # no nested exception
        )
