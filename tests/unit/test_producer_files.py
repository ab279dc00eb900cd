"""How a usage file is cut into rows, and what is no usage file."""

from __future__ import annotations

import io
import os
import threading

import pytest

from meterline.errors import UserError
from meterline.producer.files import LINE_BYTES_MAX, FileFormat, UsageFile, open_usage_file

HEADER = "client_id,correlation_id,sku,credits\n"


def read(text, file_format=FileFormat.CSV):
    data = text if isinstance(text, bytes) else text.encode()
    return [
        (row.line, dict(row.columns) or row.problem)
        for row in UsageFile("usage", io.BytesIO(data), file_format).rows()
    ]


def columns(*cells):
    return dict(zip(("client_id", "correlation_id", "sku", "credits"), cells, strict=True))


def test_a_row_is_named_by_the_line_it_starts_on():
    """A quoted cell may hold line breaks, and blank lines are no rows: the line is what an editor shows."""
    assert [
        (2, columns("acme", "two\nlines", "gpu", "1")),
        (5, columns("acme", "t2", "gpu", "2")),
    ] == read(HEADER + 'acme,"two\nlines",gpu,1\n\nacme,t2,gpu,2\n')


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff", "\ufeff\r\n"])
@pytest.mark.parametrize("file_format", FileFormat)
def test_a_file_without_anything_is_an_error(text, file_format):
    """An export that wrote nothing has failed; an hour without usage has a header."""
    with pytest.raises(UserError, match="usage is empty"):
        read(text, file_format)


def test_a_header_alone_is_no_row():
    """An hour without usage is no mistake."""
    assert read(HEADER) == []


def test_what_a_spreadsheet_writes_is_read():
    """A byte order mark and CRLF are no part of a column's name or value."""
    assert [(2, columns("acme", "t1", "gpu", "1"))] == read(
        "\ufeff" + (HEADER + "acme,t1,gpu,1\n").replace("\n", "\r\n")
    )
    assert read('\ufeff{"client_id": "acme"}\r\n', FileFormat.JSONL) == [(1, {"client_id": "acme"})]


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("client_id,correlation_id,sku,amount", "unknown column 'amount'. Known: client_id"),
        ("client_id;correlation_id;sku;credits", "unknown column 'client_id;correlation_id;sku;credits'"),
        ("client_id, correlation_id,sku,credits", "unknown column ' correlation_id'"),
        ("client_id,sku", "missing column 'correlation_id', 'credits'"),
        ("client_id,correlation_id,sku,credits,sku", "the column 'sku' is there twice"),
        ("client_id,correlation_id,sku,credits,attributes.", "unknown column 'attributes.'"),
        ('client_id,"correlation_id', "unexpected end of data"),
    ],
)
def test_a_wrong_header_refuses_the_file(header, why):
    """A misspelt column would silently be left out: the credits of a million rows, or their items."""
    with pytest.raises(UserError, match=f"usage, header: {why}"):
        read(header + "\n")


def test_a_file_in_utf16_is_named_as_such():
    """Some spreadsheets write it; its bytes look like nothing a person would recognise."""
    with pytest.raises(UserError, match="is written in UTF-16; save it as UTF-8"):
        read(HEADER.encode("utf-16"))


def test_a_file_without_lines_ends_in_bounded_memory():
    """A disk image given by mistake is refused at its first line."""
    with pytest.raises(UserError, match="line 1: more than"):
        read(b"x" * (LINE_BYTES_MAX + 1))


def test_a_row_with_too_few_or_too_many_cells_is_bad_alone():
    """A comma in an unquoted cell would move the credits into another column."""
    assert [
        (2, "3 cells where the header has 4"),
        (3, columns("acme", "t1", "gpu", "1")),
        (4, "5 cells where the header has 4"),
    ] == read(HEADER + "acme,gpu,1\nacme,t1,gpu,1\nacme,t1,gpu,1,5\n")


def test_an_open_quote_tells_how_many_lines_it_took():
    """The rows inside an open quote cannot be read; they must not be missing in silence."""
    rows = read(HEADER + 'acme,"t1,gpu,1\nacme,t2,gpu,1\nacme,t3,gpu,1\n')

    assert rows == [(2, "not CSV up to line 4: unexpected end of data")]


def test_a_json_line_that_is_no_object_is_bad_alone():
    """Each line stands for itself, and NaN and doubled keys, which Python would take, are refused."""
    rows = read('{"a": "1"}\n[1]\n{"a"\n\n{"a": NaN}\n{"a": 1, "a": 2}\n{"a": "2"}', FileFormat.JSONL)

    assert [line for line, _ in rows] == [1, 2, 3, 5, 6, 7]
    assert rows[1][1] == "not a JSON object"
    assert rows[2][1].startswith("not JSON: ")
    assert rows[3][1] == "not JSON: NaN is not a number"
    assert rows[4][1] == "not JSON: a key is there twice"


def test_deeply_nested_json_is_a_bad_row():
    """A hostile line costs one bad row, not the program."""
    rows = read("[" * 200_000 + "\n" + '{"a": "2"}', FileFormat.JSONL)

    assert [line for line, _ in rows] == [1, 2]
    assert rows[0][1].startswith("not JSON: ")


def test_a_file_is_read_as_often_as_needed(tmp_path):
    """The second pass sees what the first saw."""
    path = tmp_path / "usage.csv"
    path.write_text(HEADER + "acme,t1,gpu,1\n")
    with open_usage_file(str(path), None, None) as file:
        first, second = list(file.rows()), list(file.rows())

    assert first == second
    assert file.size == file.position


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing.csv", "No such file"),
        ("folder.csv", "Is a directory"),
        ("usage.txt", "format of .* is not known .* --format csv"),
        ("-", "format of '-' is not known"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, monkeypatch, name, why):
    """Before anything is sent."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=why), open_usage_file(name, None, io.BytesIO()):
        pass


def test_a_process_without_standard_input_says_so():
    """As under some schedulers."""
    with pytest.raises(UserError, match="no standard input"), open_usage_file("-", FileFormat.CSV, None):
        pass


def test_a_pipe_is_read_twice_like_a_file(tmp_path):
    """`meterline publish <(zcat usage.csv.gz) --format csv`: a pipe cannot be read again, so it is copied."""
    pipe = tmp_path / "usage.csv"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(HEADER + "acme,t1,gpu,1\n",))
    writer.start()
    with open_usage_file(str(pipe), None, None) as file:
        passes = [[row.line for row in file.rows()] for _ in range(2)]
    writer.join()

    assert passes == [[2], [2]]
