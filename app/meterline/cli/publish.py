"""`meterline publish FILE`: publishes the usage events of a CSV or JSON-lines file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from meterline.domain.credits import format_credits
from meterline.errors import RetryLater, UserError, WorkerMustExit
from meterline.producer import DeliveryFailed, UsageProducer
from meterline.producer.files import FileFormat, UsageFile, open_usage_file
from meterline.producer.intake import BadRow, judge_rows
from meterline.settings import load_settings

__all__ = ["publish"]

ROWS_SHOWN = 20
"""Bad rows, and equal rows, on the screen: enough to see the pattern."""
ROWS_LISTED = 1_000
"""Of each, in the JSON summary: bounded memory for a file that is bad throughout."""
PROGRESS_ROWS = 500
"""Rows between two looks at the progress bar; it draws ten times a second at most."""
INTERRUPTED_FLUSH_S = 3.0
"""After Ctrl-C: long enough for what is on its way to be acknowledged, short enough for who is waiting."""
INTERRUPTED = 130
"""The shell's exit code for a program ended by Ctrl-C."""


@dataclass(slots=True)
class Summary:
    """What became of the file; also the JSON summary.

    Attributes:
        published: events acknowledged by Kafka, equal rows included; 0 in a dry run.
        good: rows that can be published, equal rows included.
        equal: good rows that repeat an earlier event; metering counts them as duplicates.
        bad: rows that must not be published.
        credits_micro: of the good rows, equal ones once.
        equal_rows: the first of the equal ones, each with the line it equals.
        bad_rows: the first of the bad ones.
    """

    file: str
    dry_run: bool
    rows: int = 0
    good: int = 0
    equal: int = 0
    bad: int = 0
    published: int = 0
    credits_micro: int = 0
    equal_rows: list[dict[str, int]] = field(default_factory=list)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)


def publish(
    file: Annotated[str, typer.Argument(help="CSV or JSON lines; - is standard input.", show_default=False)],
    file_format: Annotated[
        FileFormat | None, typer.Option("--format", help="Default: by the suffix.", show_default=False)
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Publish the good rows of a file that has bad ones.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only judge the rows.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Publish usage events from a CSV or JSON-lines file.

    Columns: client_id, correlation_id, sku, credits (decimal); and, where wanted, item, occurred_at (ISO 8601
    with a time zone, or epoch milliseconds; default now), event_id, source, reservation_id, billable,
    attributes (a JSON object) or attributes.NAME.

    All rows are judged before the first is published: a file with a bad row publishes nothing, unless
    --skip-bad. Running it twice is safe: an event that is already counted is recognised (within metering's
    dedupe horizon, 24 hours by default). Exit code 1: a row was bad, or not everything was acknowledged.
    """
    stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with open_usage_file(file, file_format, sys.stdin.buffer if sys.stdin else None) as usage_file:
        summary = _judge(usage_file, stderr, dry_run=dry_run)
        _print_rows(summary, stderr)
        if summary.good and not dry_run and (skip_bad or not summary.bad):
            _publish(usage_file, summary, stderr, skip_bad=skip_bad)
    if as_json:
        typer.echo(json.dumps(asdict(summary)))
    else:
        typer.echo(_sentence(summary, skip_bad=skip_bad))
    if summary.bad:
        raise typer.Exit(1)


def _judge(file: UsageFile, stderr: Console, *, dry_run: bool) -> Summary:
    """The first pass: nothing is published before the last row is known."""
    summary = Summary(file=file.name, dry_run=dry_run)
    with _progress(file, stderr, "Checking") as tick:
        for row in judge_rows(file):
            summary.rows += 1
            tick(summary.rows)
            if isinstance(row, BadRow):
                summary.bad += 1
                if len(summary.bad_rows) < ROWS_LISTED:
                    summary.bad_rows.append({"line": row.line, "reason": row.reason})
                continue
            summary.good += 1
            if row.equals_line is None:
                summary.credits_micro += row.event.credits_micro
            else:
                summary.equal += 1
                if len(summary.equal_rows) < ROWS_LISTED:
                    summary.equal_rows.append({"line": row.line, "equals_line": row.equals_line})
    return summary


def _publish(file: UsageFile, summary: Summary, stderr: Console, *, skip_bad: bool) -> None:
    """The second pass. Judged again, because a file is not kept in memory."""
    producer = UsageProducer(load_settings())
    try:
        producer.check()
        with _progress(file, stderr, "Publishing") as tick:
            _queue_rows(producer, file, tick, skip_bad=skip_bad)
        producer.close()
    except KeyboardInterrupt:
        stderr.print(_interrupted(producer, summary))
        raise typer.Exit(INTERRUPTED) from None
    except (RetryLater, UserError, WorkerMustExit) as error:
        _close_quietly(producer)
        text = (
            f"{error} {producer.acknowledged} of {summary.good} events were acknowledged; running the "
            "command again is safe."
        )
        raise (UserError if isinstance(error, UserError) else RetryLater)(text) from None
    finally:
        summary.published = producer.acknowledged


def _queue_rows(
    producer: UsageProducer, file: UsageFile, tick: Callable[[int], None], *, skip_bad: bool
) -> None:
    for number, row in enumerate(judge_rows(file), 1):
        tick(number)
        if not isinstance(row, BadRow):
            producer.publish_event(row.event)
        elif not skip_bad:
            raise UserError(
                f"{file.name}, line {row.line}: {row.reason}. The file has changed since it was checked; "
                "look at it and run the command again."
            )


def _interrupted(producer: UsageProducer, summary: Summary) -> str:
    _close_quietly(producer)
    return (
        f"Interrupted: {producer.acknowledged} of {summary.good} events were acknowledged by Kafka. "
        "Running the command again is safe: these are counted once."
    )


def _close_quietly(producer: UsageProducer) -> None:
    """What was given up is in the sentence that follows: the number that was acknowledged."""
    try:
        producer.close(INTERRUPTED_FLUSH_S)
    except DeliveryFailed:
        return


def _print_rows(summary: Summary, stderr: Console) -> None:
    """Equal rows first: what is wrong should stand last, where it is seen."""
    for equal in summary.equal_rows[:ROWS_SHOWN]:
        stderr.print(f"line {equal['line']}: equal to line {equal['equals_line']}")
    if summary.equal > ROWS_SHOWN:
        stderr.print(f"... and {summary.equal - ROWS_SHOWN} more equal rows")
    for bad in summary.bad_rows[:ROWS_SHOWN]:
        stderr.print(f"line {bad['line']}: {bad['reason']}")
    if summary.bad > ROWS_SHOWN:
        stderr.print(f"... and {summary.bad - ROWS_SHOWN} more bad rows")


def _sentence(summary: Summary, *, skip_bad: bool) -> str:
    credits_text = f"{format_credits(summary.credits_micro)} credits"
    if summary.dry_run:
        text = f"Dry run: {summary.good} of {summary.rows} rows can be published ({credits_text})."
    elif summary.bad and not skip_bad:
        text = (
            f"Nothing was published: {summary.bad} of {summary.rows} rows are bad. Correct them, or publish "
            "the others with --skip-bad."
        )
    else:
        text = f"Published {summary.published} events ({credits_text})."
        if summary.bad:
            text += f" Skipped {summary.bad} bad rows."
    if summary.equal:
        text += f" {summary.equal} rows are equal to earlier ones; metering counts them as duplicates."
    return text


@contextmanager
def _progress(file: UsageFile, stderr: Console, title: str) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of the file, on a terminal only; yields what to call with each row's number."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rows]} rows"))
    with Progress(
        *columns, TimeRemainingColumn(), console=stderr, transient=True, disable=not stderr.is_terminal
    ) as bar:
        task: TaskID = bar.add_task(title, total=file.size, rows=0)

        def tick(rows: int) -> None:
            if rows % PROGRESS_ROWS == 0:
                bar.update(task, completed=file.position, rows=rows)

        yield tick
