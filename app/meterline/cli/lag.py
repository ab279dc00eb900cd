"""`meterline lag`: how far metering is behind, and what became of every offset.

Reads the committed state from `metering-state-changelog` and asks Kafka where the logs end; needs no worker.

Exit codes: 0 shown (with `--account`: everything adds up); 1 something doesn't, or Kafka is away.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from meterline.cli.period import iso
from meterline.contracts.topics import METERING_CHANGELOG, USAGE_EVENTS
from meterline.metering.account import OffsetAccount, account_of
from meterline.metering.state import Meta, meta_key
from meterline.settings import KafkaSettings, load_settings
from meterline.streaming.changelog import read_changelog
from meterline.streaming.log_ranges import read_log_ranges, topic_partition_counts

__all__ = ["lag"]


def lag(
    account: Annotated[
        bool,
        typer.Option(
            "--account", help="Check that first..last = accepted + duplicates + dead + control + unknown."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """How far metering is behind, by partition of `usage.events`."""
    accounts = _accounts(load_settings().kafka)
    problems = [one.problem for one in accounts if one.problem]
    if as_json:
        partitions = [_as_json(one) for one in accounts]
        typer.echo(json.dumps({"adds_up": not problems, "partitions": partitions}))
    else:
        Console().print(_account_table(accounts) if account else _lag_table(accounts))
        for problem in problems:
            typer.echo(problem, err=True)
    raise typer.Exit(1 if account and problems else 0)


def _accounts(kafka: KafkaSettings) -> list[OffsetAccount]:
    counts = topic_partition_counts(kafka, [USAGE_EVENTS, METERING_CHANGELOG])
    partitions = range(counts[USAGE_EVENTS])
    metas = [_meta(kafka, partition) for partition in partitions]
    # Asked after the states were read: a log only grows, so none of them can seem to be beyond its end.
    logs = read_log_ranges(kafka, USAGE_EVENTS, list(partitions))
    return [account_of(metas[partition], logs[partition]) for partition in partitions]


def _meta(kafka: KafkaSettings, partition: int) -> Meta | None:
    saved = read_changelog(kafka, METERING_CHANGELOG, partition).get(meta_key(partition))
    return Meta.from_bytes(saved) if saved is not None else None


def _lag_table(accounts: Sequence[OffsetAccount]) -> Table:
    table = Table(title=f"Metering of {USAGE_EVENTS}")
    table.add_column("partition", justify="right")
    table.add_column("applied", justify="right")
    table.add_column("lag", justify="right")
    table.add_column("appended at (UTC)")
    table.add_column("watermark (UTC)")
    for one in accounts:
        applied = str(one.last) if one.offsets else "-"
        times = [_time(one.appended_at_ms) or "-", _time(one.watermark_ms) or "-"]
        table.add_row(str(one.partition), applied, str(one.lag), *times)
    return table


def _account_table(accounts: Sequence[OffsetAccount]) -> Table:
    table = Table(title=f"What became of every offset of {USAGE_EVENTS}", show_footer=True)
    rows = [
        (one.offsets, one.accepted, one.duplicates, one.dead_letters, one.control, one.unknown, one.lag)
        for one in accounts
    ]
    sums = [str(sum(column)) for column in zip(*rows, strict=True)]
    table.add_column("partition", "all", justify="right")
    table.add_column("first..last")
    for name, total in zip(
        ("offsets", "accepted", "duplicates", "dead", "control", "unknown", "lag"), sums, strict=True
    ):
        table.add_column(name, total, justify="right")
    table.add_column("adds up")
    for one, row in zip(accounts, rows, strict=True):
        span = f"{one.first}..{one.last}" if one.offsets else "none"
        table.add_row(str(one.partition), span, *map(str, row), "NO" if one.problem else "yes")
    return table


def _as_json(one: OffsetAccount) -> dict[str, Any]:
    times = {"watermark": _time(one.watermark_ms), "appended_at": _time(one.appended_at_ms)}
    numbers = {name: value for name, value in asdict(one).items() if not name.endswith("_ms")}
    return numbers | {"offsets": one.offsets, "counted": one.counted, "adds_up": not one.problem} | times


def _time(milliseconds: int) -> str | None:
    """None before the first record."""
    return iso(datetime.fromtimestamp(milliseconds / 1000, UTC)) if milliseconds > 0 else None
