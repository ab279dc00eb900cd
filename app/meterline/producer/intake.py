"""Judges every row of a usage file: an event to publish, or a bad row with its reason."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from meterline.domain.events import UsageEvent
from meterline.errors import UserError
from meterline.producer.files import UsageFile
from meterline.producer.rows import event_of_row
from meterline.producer.seen import SeenEvents

__all__ = ["BadRow", "GoodRow", "judge_rows"]


@dataclass(frozen=True, slots=True)
class GoodRow:
    """A row that can be published.

    Attributes:
        equals_line: an earlier row that is the same event; metering counts the two once. None: there is none.
    """

    line: int
    event: UsageEvent
    equals_line: int | None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that must not be published."""

    line: int
    reason: str


def judge_rows(file: UsageFile) -> Iterator[GoodRow | BadRow]:
    """Read the file once and judge each row, in order; times in it are judged against the wall clock.

    Raises:
        UserError: the file as a whole is not what it should be.
    """
    with SeenEvents() as seen:
        for row in file.rows():
            if row.problem:
                yield BadRow(row.line, row.problem)
                continue
            try:
                event = event_of_row(row.columns, time.time_ns() // 1_000_000)
            except UserError as error:
                yield BadRow(row.line, str(error))
                continue
            match seen.note(event, row.line):
                case None:
                    yield GoodRow(row.line, event, None)
                case (first_line, True):
                    yield GoodRow(row.line, event, first_line)
                case (first_line, _):
                    yield BadRow(
                        row.line,
                        f"contradicts line {first_line}: the same event id {event.event_id} with another "
                        "payload; if the task charges this SKU more than once, number the charges in `item`",
                    )
