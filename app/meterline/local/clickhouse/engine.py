"""chDB: one embedded ClickHouse engine per process, one connection of it per client."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import chdb
from chdb import ChdbError

__all__ = ["Engine", "EngineError", "Session"]

CODE = re.compile(r"Code: (\d+)\. ")
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

    def stream(self, sql: str) -> Generator[bytes, None, None]:
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

    def insert(self, table: str, columns: Sequence[tuple[str, str]], blocks: Sequence[bytes]) -> None:
        """Insert Native blocks of these columns, names and types; all of them or nothing.

        When this returns the rows survive a killed process. The engine reads them as a file, because chDB's
        own `send_insert` (4.4) reports success when the table refuses the rows: a broken constraint, too many
        partitions, a time limit.
        """
        if not blocks:
            return
        names = ", ".join(_quoted(name) for name, _ in columns)
        structure = ", ".join(f"{_quoted(name)} {type_name}" for name, type_name in columns)
        with _as_file(blocks) as path:
            rows = f"file({_text(path)}, Native, {_text(structure)})"
            self.query(f"INSERT INTO {table} ({names}) SELECT * FROM {rows}")  # noqa: S608 - quoted, or the client's own


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
    return _text(value)


def _text(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


@contextmanager
def _as_file(blocks: Iterable[bytes]) -> Iterator[str]:
    """A path under which the engine can read the blocks; nothing of it is left, also by a killed process."""
    if sys.platform == "linux":
        with os.fdopen(os.memfd_create("insert"), "wb") as file:
            file.writelines(blocks)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:  # no file without a name: a killed process leaves it to the system's clean-up
        with tempfile.NamedTemporaryFile(prefix="meterline-insert-") as file:
            file.writelines(blocks)
            file.flush()
            yield file.name
