"""`meterline receipt CLIENT`: every task a client pays for, and how each window reached Stripe.

Tasks are read and printed in order of time, so that a receipt of millions of tasks needs no memory for them.
They are grouped by window; what no snapshot covers yet stands in groups of its own, `open`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Annotated, Any, Protocol

import typer

from meterline.cli.period import Since, Until, iso, parse_period
from meterline.domain.credits import format_credits
from meterline.domain.windows import SkuTotal
from meterline.ledger.client import connect, explained
from meterline.ledger.reports import (
    ReceiptLine,
    RecordState,
    WindowState,
    has_usage,
    receipt_lines,
    record_states,
    window_states,
)
from meterline.settings import load_settings

__all__ = ["receipt"]


def receipt(
    client_id: Annotated[str, typer.Argument(metavar="CLIENT", help="The client's id.")],
    since: Since = "",
    until: Until = "",
    limit: Annotated[
        int | None, typer.Option(min=0, help="List at most so many tasks; the sums are of all of them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines for programs.")] = False,
) -> None:
    """Every task of a client, subtotals per window and SKU, and how each window reached Stripe."""
    period = parse_period(since, until)
    settings = load_settings().clickhouse
    with explained(settings), connect(settings) as client:
        if not has_usage(client, client_id):
            typer.echo(
                f"Error: the ledger has no usage of a client `{client_id}`. Is the id right?", err=True
            )
            raise typer.Exit(1)
        windows = window_states(client, client_id, period)
        records = record_states(client, client_id, period)
        lines = receipt_lines(client, client_id, period)
        _print(lines, windows, records, JsonLines() if as_json else Text(client_id), limit)


class Printer(Protocol):
    """One form of the receipt."""

    def task(self, line: ReceiptLine) -> None:
        """One task."""

    def group(
        self, window: WindowState | None, skus: Mapping[str, SkuTotal], records: Sequence[RecordState]
    ) -> None:
        """The end of a window's tasks; None: no snapshot covers them yet."""

    def total(self, total: SkuTotal, listed: int) -> None:
        """The end of the receipt, with the number of tasks that were listed."""


def _print(
    lines: Iterator[ReceiptLine],
    windows: Sequence[WindowState],
    records: Iterable[RecordState],
    printer: Printer,
    limit: int | None,
) -> None:
    starts = [window.start for window in windows]
    records_of: dict[tuple[datetime, datetime], list[RecordState]] = {}
    for record in records:
        records_of.setdefault((record.window_start, record.window_end), []).append(record)

    def window_of(line: ReceiptLine) -> WindowState | None:
        index = bisect_right(starts, line.occurred_at) - 1
        return windows[index] if index >= 0 and line.occurred_at < windows[index].end else None

    total = SkuTotal()
    listed = 0
    for window, tasks in groupby(lines, key=window_of):
        skus: dict[str, SkuTotal] = {}
        for task in tasks:
            _add(skus.setdefault(task.sku, SkuTotal()), task)
            _add(total, task)
            if limit is None or listed < limit:
                printer.task(task)
                listed += 1
        printer.group(window, skus, records_of.get((window.start, window.end), []) if window else [])
    printer.total(total, listed)


def _add(total: SkuTotal, task: ReceiptLine) -> None:
    if task.billable:
        total.count += 1
        total.credits_micro += task.credits_micro
    else:
        total.free_count += 1
        total.free_credits_micro += task.credits_micro


class Text:
    """For people: aligned lines, printed as they come."""

    def __init__(self, client_id: str) -> None:
        typer.echo(f"Receipt of {client_id}\n")
        typer.echo(f"{'time (UTC)':<24}  {'SKU':<20}  {'credits':>14}  {'correlation id':<36}  event id")

    def task(self, line: ReceiptLine) -> None:
        """One task, with what is special about it at the end."""
        notes = [
            note
            for note, holds in (
                ("free", not line.billable),
                (f"{line.corrects_kind} of {line.corrects_event_id}", line.corrects_event_id),
                ("older than Stripe takes: billed in the current period", line.beyond_billing_horizon),
            )
            if holds
        ]
        typer.echo(
            f"{iso(line.occurred_at):<24}  {line.sku:<20}  {format_credits(line.credits_micro):>14}"
            f"  {line.correlation_id:<36}  {line.event_id}" + (f"  ({', '.join(notes)})" if notes else "")
        )

    def group(
        self, window: WindowState | None, skus: Mapping[str, SkuTotal], records: Sequence[RecordState]
    ) -> None:
        """Subtotals, and what billing did."""
        name = (
            f"window {iso(window.start)} to {iso(window.end)}, closed" if window else "open, may still grow"
        )
        typer.echo(f"  {name}")
        for sku, total in sorted(skus.items()):
            typer.echo(f"    {sku}: {_words(total)}")
        charged = sum(total.credits_micro for total in skus.values())
        if window and window.credits_micro != charged:
            typer.echo(
                f"    the window's latest snapshot says {format_credits(window.credits_micro)} credits:"
                " the rest is outside this period, or newer than the snapshot"
            )
        for record in records:
            typer.echo(f"    {_outcome(record)}")
        typer.echo("")

    def total(self, total: SkuTotal, listed: int) -> None:
        """The sum of everything, listed or not."""
        typer.echo(f"Total: {_words(total)}")
        if (left_out := total.count + total.free_count - listed) > 0:
            typer.echo(f"{left_out} tasks are not listed (--limit)")


class JsonLines:
    """For programs: one object a line, `type` says which: task, window or total."""

    def task(self, line: ReceiptLine) -> None:
        """One task."""
        _echo_json(
            type="task",
            occurred_at=iso(line.occurred_at),
            sku=line.sku,
            **_credits(line.credits_micro),
            billable=line.billable,
            correlation_id=line.correlation_id,
            event_id=line.event_id,
            corrects_event_id=line.corrects_event_id or None,
            corrects_kind=line.corrects_kind or None,
            beyond_billing_horizon=line.beyond_billing_horizon,
        )

    def group(
        self, window: WindowState | None, skus: Mapping[str, SkuTotal], records: Sequence[RecordState]
    ) -> None:
        """Subtotals by SKU, the snapshot's credits, and the usage records."""
        _echo_json(
            type="window",
            closed=window is not None,
            window_start=iso(window.start) if window else None,
            window_end=iso(window.end) if window else None,
            snapshot_credits_micro=window.credits_micro if window else None,
            skus={sku: _totals(total) for sku, total in sorted(skus.items())},
            usage_records=[
                {
                    "meter": record.meter,
                    **_credits(record.credits_micro),
                    "identifier": record.identifier or None,
                    "stripe_customer": record.stripe_customer or None,
                    "value": record.value,
                    "event_timestamp": iso(record.event_timestamp) if record.identifier else None,
                    "state": record.state or None,
                    "reason": record.reason or None,
                    "attempts": record.attempts,
                    "request_id": record.request_id or None,
                }
                for record in records
            ],
        )

    def total(self, total: SkuTotal, listed: int) -> None:
        """The sum of everything, listed or not."""
        _echo_json(type="total", **_totals(total), listed=listed)


def _outcome(record: RecordState) -> str:
    """What billing did with a window, in one line."""
    counted = f"{format_credits(record.credits_micro)} credits counted for meter {record.meter}"
    because = f" ({record.reason})" if record.reason else ""
    if record.identifier:
        return (
            f"Stripe: {counted}, usage record of {record.value}: {record.state}{because}, {record.identifier}"
        )
    if record.state:
        return f"Stripe: {record.state}{because}"
    return f"Stripe: {counted}, no whole unit to report"


def _words(total: SkuTotal) -> str:
    free = f", free: {total.free_count} tasks, {format_credits(total.free_credits_micro)} credits"
    return f"{total.count} tasks, {format_credits(total.credits_micro)} credits" + (
        free if total.free_count else ""
    )


def _totals(total: SkuTotal) -> dict[str, Any]:
    return {
        "tasks": total.count,
        **_credits(total.credits_micro),
        "free_tasks": total.free_count,
        "free_credits": format_credits(total.free_credits_micro),
        "free_credits_micro": total.free_credits_micro,
    }


def _credits(micro: int) -> dict[str, Any]:
    """A decimal string for reading, an integer of micro-credits for computing."""
    return {"credits": format_credits(micro), "credits_micro": micro}


def _echo_json(**fields: Any) -> None:
    typer.echo(json.dumps(fields))
