"""A row of a file is taken exactly or refused by name; nothing in between."""

from __future__ import annotations

import csv
import io
import json

from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.credits import CREDITS_MICRO_MAX, format_credits
from meterline.domain.events import ID_BYTES_MAX, default_event_id
from meterline.errors import UserError
from meterline.producer.files import FileFormat, UsageFile
from meterline.producer.rows import COLUMNS, event_of_row

NOW_MS = 1_764_000_000_000
IDS = st.text(min_size=1, max_size=ID_BYTES_MAX // 4)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.decimals(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(IDS, IDS, IDS, st.integers(0, CREDITS_MICRO_MAX), st.integers(0, 2**63 - 1))
def test_csv_and_json_lines_say_the_same_event(client_id, correlation_id, sku, micro, item):
    """Whatever the ids hold (quotes, commas, line breaks), both forms give the one deterministic event."""
    cells = {
        "client_id": client_id,
        "correlation_id": correlation_id,
        "sku": sku,
        "credits": format_credits(micro),
        "item": str(item),
    }
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([cells.keys(), cells.values()])
    forms = [(text.getvalue(), FileFormat.CSV), (json.dumps(cells), FileFormat.JSONL)]

    for written, file_format in forms:
        (row,) = UsageFile("usage", io.BytesIO(written.encode()), file_format).rows()
        event = event_of_row(row.columns, NOW_MS)

        assert (client_id, correlation_id, sku, micro) == event[1:5]
        assert default_event_id(client_id, correlation_id, sku, item) == event.event_id


@given(st.dictionaries(st.sampled_from(COLUMNS) | st.just("attributes.a"), JSON_VALUES))
def test_no_row_raises_anything_but_its_refusal(columns):
    """A file may hold anything; only a refusal by name becomes a bad row, all else would end the program."""
    try:
        event = event_of_row(columns, NOW_MS)
    except UserError:
        return
    assert event.client_id == columns["client_id"]


@given(st.binary(max_size=300), st.sampled_from(FileFormat))
def test_no_bytes_end_the_program(data, file_format):
    """The same for the bytes of the whole file."""
    file = UsageFile("usage", io.BytesIO(b"client_id,correlation_id,sku,credits\n" + data), file_format)
    for row in file.rows():
        try:
            event_of_row(row.columns, NOW_MS)
        except UserError:
            continue
