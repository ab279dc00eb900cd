"""chDB: one embedded ClickHouse engine per process, one connection of it per client."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import chdb
from chdb import ChdbError

__all__ = ["Engine", "EngineError", "Session"]

CODE = re.compile(r"Code: (\d+)\. ")
INSERTING = threading.Lock()
"""One insert feeds the engine at a time (chDB 4.4: four at once wait for each other for ever). It is held for
milliseconds and never while a client's bytes are awaited."""

UNKNOWN_CODE = 1002
"""ClickHouse's UNKNOWN_EXCEPTION: an error without a code of its own."""


class EngineError(Exception):
    """ClickHouse refused something.

    Attributes:
        code: ClickHouse's error number.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, error: Exception) -> EngineError:
        """Find number and text in what chDB raised."""
        text = str(error)
        found = CODE.search(text)
        return cls(int(found[1]) if found else UNKNOWN_CODE, text[found.end() :] if found else text)


class Session:
    """One client's connection: its own current database and settings.

    Queries of one connection run one after another, those of different connections in parallel. A session
    belongs to one thread.
    """

    def __init__(self, connection: Any, tag: str) -> None:
        self._connection = connection
        self._settings: dict[str, str] = {}
        self.tag = tag
        # Type names on one line, as clients parse them; the tag is how `Engine.kill` finds our queries.
        self.query(f"SET print_pretty_type_names = 0, log_comment = '{tag}'")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def use(self, database: str) -> None:
        """Change the current database."""
        self.query(f"USE {_quoted(database)}")

    def apply(self, settings: Mapping[str, str]) -> None:
        """Make the client's settings the session's: what it no longer sends goes back to its default."""
        gone = [f"{name} = DEFAULT" for name in self._settings if name not in settings]
        new = [
            f"{name} = {_literal(value)}"
            for name, value in settings.items()
            if self._settings.get(name) != value
        ]
        if gone:
            self.query(f"SET {', '.join(gone)}")
            self._settings = {name: value for name, value in self._settings.items() if name in settings}
        if new:
            self.query(f"SET {', '.join(new)}")
            self._settings = dict(settings)

    def query(self, sql: str, output_format: str = "Native") -> bytes:
        """Run a statement to its end; its whole result in `output_format`."""
        try:
            return self._connection.query(sql, output_format).bytes() or b""
        except (ChdbError, RuntimeError) as error:
            raise EngineError.of(error) from None

    def stream(self, sql: str) -> Iterator[bytes]:
        """Run a SELECT; its blocks in Native format, one by one, in constant memory."""
        try:
            with self._connection.send_query(sql, "Native") as result:
                for chunk in result:
                    yield chunk.bytes()
        except (ChdbError, RuntimeError) as error:
            raise EngineError.of(error) from None

    def header(self, relation: str) -> list[tuple[str, str]]:
        """Names and types of what can be inserted into a table, or of a bracketed SELECT's result."""
        described = json.loads(self.query(f"DESCRIBE TABLE {relation}", "JSONCompact"))["data"]
        computed = ("MATERIALIZED", "ALIAS", "EPHEMERAL")
        return [(name, type_name) for name, type_name, kind, *_ in described if kind not in computed]

    def insert(self, statement: str, blocks: Iterable[bytes]) -> None:
        """Run an INSERT (without VALUES or FORMAT) of Native blocks; all of them or nothing.

        When this returns the rows survive a killed process.
        """
        try:
            with INSERTING, self._connection.send_insert(statement, "Native") as inserter:
                for block in blocks:
                    inserter.append(block)
                inserter.finish()
        except (ChdbError, RuntimeError) as error:
            raise EngineError.of(error) from None


class Engine:
    """The database in one directory. chDB allows one per process."""

    def __init__(self, data_dir: Path) -> None:
        self._path = str(data_dir)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._killer = self.session()

    def session(self) -> Session:
        """A new connection."""
        connection = chdb.connect(self._path)  # type: ignore[no-untyped-call]  # chDB has half its types
        return Session(connection, f"client-{next(self._numbers)}")

    def kill(self, session: Session) -> None:
        """Cancel what another thread runs in `session`."""
        with self._lock:
            self._killer.query(f"KILL QUERY WHERE Settings['log_comment'] = '{session.tag}' ASYNC")


def _quoted(name: str) -> str:
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def _literal(value: str) -> str:
    """A setting's value as SQL. Numbers arrive as text too."""
    if re.fullmatch(r"-?\d+(\.\d+)?", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
