"""`meterline quota check`: are the buckets what the log says, and the totals what the ledger says?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from meterline.cli.period import iso
from meterline.clients import ClientRegistry
from meterline.domain.credits import format_credits
from meterline.ledger.asker import LedgerAsker
from meterline.quota.check import QuotaCheck, Report
from meterline.quota.inspect import BucketReader, open_redis
from meterline.quota.statements import LogStatements
from meterline.settings import Settings, load_settings

__all__ = ["check"]

READ_S_MAX = 30.0
"""A compacted topic of a million clients is read in seconds; a broker that hangs is told as such."""
LINES_MAX = 20
"""Of each list on a terminal; `--json` has all."""


def check(
    client_ids: Annotated[
        list[str] | None, typer.Argument(metavar="CLIENT", help="Only these; default: all.")
    ] = None,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0, help="How long buckets may take to catch up with the log.")
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """Compare every bucket with the log, and the log with the ledger. Exit code 1: something differs."""
    report = _checked(load_settings(), client_ids or [], wait_s, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(_facts(report)))
    else:
        _print(report)
    raise typer.Exit(0 if report.equal else 1)


def _checked(settings: Settings, only: Sequence[str], wait_s: float, *, quiet: bool) -> Report:
    with ClientRegistry(settings) as registry:
        registry.wait_until_caught_up(READ_S_MAX)
        clients = registry.snapshot()
    told: list[str] = []

    def say(text: str) -> None:
        if not quiet and text not in told:  # each only once: a wait repeats itself
            told.append(text)
            typer.echo(text, err=True)

    with (
        open_redis(settings.redis) as redis,
        LogStatements.open(settings.kafka) as log,
        LedgerAsker(settings.clickhouse) as ledger,
    ):
        reader = BucketReader(redis, settings.redis.namespace)
        return QuotaCheck(reader, log, ledger, clients, only=only, say=say).run(wait_s)


def _facts(report: Report) -> dict[str, Any]:
    """All of it; amounts are micro-credits."""
    facts = asdict(report) | {"equal": report.equal}
    for usage in facts["unreserved"]:
        usage["first_at"], usage["last_at"] = iso(usage["first_at"]), iso(usage["last_at"])
    return facts


def _print(report: Report) -> None:
    console = Console(markup=False)
    if report.differences:
        table = Table("client", "what", "found", "expected", title="Differences", title_justify="left")
        for one in report.differences[:LINES_MAX]:
            table.add_row(one.client_id or "all", one.what, one.found, one.expected)
        console.print(table)
        _rest(len(report.differences))
    for lost in report.lost[:LINES_MAX]:
        typer.echo(
            f"settled, and not in the ledger: {lost.client_id} {lost.reservation_id}, "
            f"{format_credits(lost.credits_micro)} credits at {lost.topic_id}/{lost.partition}/{lost.offset}"
        )
    _rest(len(report.lost))
    for usage in report.unreserved[:LINES_MAX]:
        typer.echo(
            f"without a reservation, though the policy is deny: {usage.client_id}, {usage.events} events, "
            f"{format_credits(usage.credits_micro)} credits, {iso(usage.first_at)} to {iso(usage.last_at)}, "
            f"e.g. {', '.join(usage.examples)}"
        )
    _rest(len(report.unreserved))
    table = Table("more than granted can be used by", title="Worst-case exposure", title_justify="left")
    table.add_column("credits", justify="right")
    table.add_column("of", justify="right")
    table.add_column("that is")
    for term in report.exposure:
        table.add_row(term.term, format_credits(term.credits_micro), str(term.count), term.means)
    console.print(table)
    if report.passed_by:
        typer.echo(f"{report.passed_by} records of credit.grants and usage.totals were not understood.")
    verdict = "equal: yes" if report.equal else f"equal: no, {len(report.differences)} differences"
    typer.echo(f"{verdict} (generation {report.generation}, buckets={report.buckets} totals={report.totals})")


def _rest(count: int) -> None:
    if count > LINES_MAX:
        typer.echo(f"... and {count - LINES_MAX} more: --json has all")
