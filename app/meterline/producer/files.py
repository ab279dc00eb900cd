"""Reads CSV and JSON-lines files row by row, in constant memory, as often as needed."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from meterline.errors import UserError
from meterline.producer.rows import require_columns

__all__ = ["FileFormat", "Row", "UsageFile", "open_usage_file"]

LINE_BYTES_MAX = 4 * 1024 * 1024
"""A record is at most 512 KiB, and JSON writes a byte as six characters at most; longer is no event."""

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = "\ufeff"


class FileFormat(StrEnum):
    """How the rows are written."""

    CSV = "csv"
    JSONL = "jsonl"


_SUFFIXES = {".csv": FileFormat.CSV, ".jsonl": FileFormat.JSONL, ".ndjson": FileFormat.JSONL}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the line it starts on (from 1), and its columns, or why they cannot be read."""

    line: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


class UsageFile:
    """A file of usage events.

    Attributes:
        name: for messages.
        size: bytes.
        position: bytes read so far in the present pass.
    """

    def __init__(self, name: str, stream: BinaryIO, file_format: FileFormat) -> None:
        self.name = name
        self.size = stream.seek(0, 2)
        self.position = 0
        self._stream = stream
        self._format = file_format

    def rows(self) -> Iterator[Row]:
        """All rows from the first; blank lines are no rows.

        Raises:
            UserError: the file as a whole is not what it should be.
        """
        return self._csv_rows() if self._format is FileFormat.CSV else self._json_rows()

    def _lines(self) -> Iterator[str]:
        """Text of each line. A byte that is not UTF-8 becomes a lone surrogate: its row is bad later."""
        self._stream.seek(0)
        self.position = 0
        number = 0
        while line := self._stream.readline(LINE_BYTES_MAX + 1):
            number += 1
            self.position += len(line)
            if len(line) > LINE_BYTES_MAX:
                raise UserError(
                    f"{self.name}, line {number}: more than {LINE_BYTES_MAX} bytes; this is no usage file"
                )
            if number == 1 and line.startswith(_UTF16_MARKS):
                raise UserError(f"{self.name} is written in UTF-16; save it as UTF-8")
            text = line.decode("utf-8", "surrogateescape")
            yield text.removeprefix(_UTF8_MARK) if number == 1 else text

    def _csv_rows(self) -> Iterator[Row]:
        reader = csv.reader(self._lines(), strict=True)  # strict: an open quote must not swallow the file
        header: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                if not header:
                    self._refuse_empty()
                return
            except csv.Error as error:
                if not header:
                    self._refuse_header(str(error))
                yield Row(line, problem=f"not CSV{_up_to(line, reader.line_num)}: {error}")
                continue
            if not cells:
                continue
            if not header:
                header = cells
                try:
                    require_columns(header)
                except UserError as error:
                    self._refuse_header(str(error))
            elif len(cells) != len(header):
                span = _up_to(line, reader.line_num)
                yield Row(line, problem=f"{len(cells)} cells{span} where the header has {len(header)}")
            else:
                yield Row(line, dict(zip(header, cells, strict=True)))

    def _refuse_header(self, problem: str) -> NoReturn:
        raise UserError(f"{self.name}, header: {problem}") from None

    def _refuse_empty(self) -> NoReturn:
        raise UserError(f"{self.name} is empty")

    def _json_rows(self) -> Iterator[Row]:
        is_empty = True
        for number, text in enumerate(self._lines(), 1):
            if not text.strip():
                continue
            is_empty = False
            try:
                columns = json.loads(
                    text,
                    parse_float=Decimal,
                    parse_constant=_refuse_constant,
                    object_pairs_hook=_object,
                )
            except (ValueError, RecursionError) as error:
                yield Row(number, problem=f"not JSON: {error}")
                continue
            if isinstance(columns, dict):
                yield Row(number, columns)
            else:
                yield Row(number, problem="not a JSON object")
        if is_empty:
            self._refuse_empty()


@contextmanager
def open_usage_file(name: str, file_format: FileFormat | None, stdin: BinaryIO | None) -> Iterator[UsageFile]:
    """Open a file by its name; `-` is standard input. A pipe is first copied to disk: it is read twice.

    Args:
        file_format: None: by the suffix .csv, .jsonl or .ndjson.
        stdin: None: the process has none.

    Raises:
        UserError: it cannot be opened, or its format is not known.
    """
    found = file_format or _SUFFIXES.get(Path(name).suffix.lower())
    if found is None:
        raise UserError(
            f"the format of {name!r} is not known by its name (.csv, .jsonl, .ndjson); give --format csv or "
            "--format jsonl"
        )
    with ExitStack() as opened:
        try:
            stream = stdin if name == "-" else opened.enter_context(Path(name).open("rb"))
            if stream is None:
                raise UserError("there is no standard input to read")
            if name == "-" or not stream.seekable():
                copy = opened.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stream, copy)
                stream = copy
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from None
        yield UsageFile("standard input" if name == "-" else name, stream, found)


def _up_to(line: int, last_line: int) -> str:
    """Which lines a bad row took along: an open quote takes many."""
    return f" up to line {last_line}" if last_line > line else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two equal keys Python would silently keep the last."""
    columns = dict(pairs)
    if len(columns) != len(pairs):
        raise ValueError("a key is there twice")
    return columns


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
