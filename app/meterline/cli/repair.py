"""`meterline repair`: bring a halted partition back. Who and why are in the ledger before it is done."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated

import typer

from meterline.cli.who import By, check_reason, person
from meterline.contracts.topics import METERING_CHANGELOG, USAGE_EVENTS, USAGE_WINDOWS
from meterline.domain.credits import format_credits
from meterline.errors import PartitionHalted, UserError
from meterline.ledger.asker import LedgerAsker
from meterline.ledger.repairs import Repair, write_repair
from meterline.metering.repair_evidence import Evidence, RepairTools
from meterline.metering.repair_ledger import LedgerPlan, insert_missing, plan_ledger
from meterline.metering.repair_log import LogPlan, fill_log, plan_log
from meterline.metering.repair_state import StatePlan, commit_as_owner, plan_state
from meterline.metering.state import Counters
from meterline.settings import Settings, load_settings
from meterline.streaming.log_ranges import read_log_ranges, topic_partition_counts
from meterline.streaming.owner import LogRange

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Bring a halted partition back. Each command changes nothing where it could not be right.",
)

Partitions = Annotated[list[int], typer.Argument(metavar="PARTITION", help="Of usage.events.", min=0)]
Reason = Annotated[str, typer.Option(help="Why; it is kept in the ledger. Not needed with --dry-run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would change, change nothing.")]

RESTART = "Restart the metering worker: a halted partition is not looked at again before."


@app.command()
def state(
    partitions: Partitions,
    reason: Reason = "",
    by: By = "",
    accept_gap: Annotated[
        str, typer.Option(metavar="FROM..TO", help="Go on without these offsets, which the log has lost.")
    ] = "",
    dry_run: DryRun = False,
) -> None:
    """Rebuild the state of partitions from the ledger, and publish what an older topic still owes.

    A worker that runs a partition which needs it is fenced out: it ends itself at its next commit.
    """
    gap = _gap(accept_gap)
    if gap is not None and len(partitions) > 1:
        raise UserError("--accept-gap is about one partition: each has a gap of its own")

    def repair(order: _Order, log: LogRange) -> str:
        def plan() -> StatePlan | None:
            return plan_state(order.tools, Evidence.gather(order.tools, log, METERING_CHANGELOG), gap)

        # Planned without fencing first: a partition that needs nothing keeps its worker.
        if (found := plan()) is None:
            return ""
        _show_state(found)
        if dry_run:
            return "would be rebuilt"
        with order.recorded(
            "state", log, found.meta.counters.first_offset, found.meta.applied_offset
        ) as told:
            done = commit_as_owner(order.settings.kafka, log.partition, plan)
            told.append(f"{found.why}; rebuilt" if done is not None else "another repair was faster")
        return "rebuilt"

    _each(partitions, reason, by, dry_run, repair)


@app.command()
def ledger(  # noqa: PLR0917 - typer's options, given by name
    partitions: Partitions,
    reason: Reason = "",
    by: By = "",
    first: Annotated[
        int | None, typer.Option("--from", min=0, help="First offset; default: the oldest in the log.")
    ] = None,
    last: Annotated[
        int | None, typer.Option("--to", min=0, help="Last offset; default: the last counted one.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Read counted offsets from the log again and insert the rows that the ledger lacks.

    Only if the ledger then equals the state (or, without a state, what was published).
    """
    if (first, last) != (None, None) and len(partitions) > 1:
        raise UserError("--from and --to are about one partition: each has offsets of its own")

    def repair(order: _Order, log: LogRange) -> str:
        evidence = Evidence.gather(order.tools, log, METERING_CHANGELOG)
        plan = plan_ledger(order.tools, evidence, first, last)
        if not plan.missing:
            return ""
        _show_ledger(plan)
        if dry_run:
            return "rows would be inserted"
        with order.recorded("ledger", log, plan.first, plan.last) as told:
            insert_missing(order.tools, plan, order.settings.clickhouse)
            told.append(f"{plan.missing} rows, {format_credits(plan.credits_micro)} credits inserted")
        return "rows inserted"

    _each(partitions, reason, by, dry_run, repair)


@app.command()
def log(partitions: Partitions, reason: Reason = "", by: By = "", dry_run: DryRun = False) -> None:
    """Fill a log that lost its end up to the last counted offset, so that no new event is passed by."""

    def repair(order: _Order, log: LogRange) -> str:
        kafka = order.settings.kafka
        plan = plan_log(kafka, Evidence.gather(order.tools, log, METERING_CHANGELOG))
        if plan is None:
            return ""
        _show_log(plan)
        if dry_run:
            return "would be filled"
        with order.recorded("log", log, plan.first, plan.last) as told:
            again = fill_log(kafka, plan)
            told.append(f"filled; {again} events at counted offsets appended again")
        return "filled"

    _each(partitions, reason, by, dry_run, repair)


class _Order:
    """What a person has ordered, and what the repairs of its partitions share."""

    def __init__(
        self, settings: Settings, tools: RepairTools, asker: LedgerAsker, reason: str, by: str
    ) -> None:
        self.settings = settings
        self.tools = tools
        self._asker = asker
        self._reason = reason
        self._by = by

    def recorded(
        self, action: str, log: LogRange, first: int, last: int
    ) -> AbstractContextManager[list[str]]:
        """Write the row, let the repair be made, and write what came of it."""
        repair = Repair(
            repair_id=uuid.uuid4().hex,
            ordered_at=time.time_ns() // 1_000_000,
            action=action,
            topic_id=log.topic_id,
            partition=log.partition,
            first_offset=first,
            last_offset=last,
            changed_by=self._by,
            reason=self._reason,
        )
        return self._asker.recorded(write_repair, repair)


def _each(
    partitions: Sequence[int], reason: str, by: str, dry_run: bool, repair: Callable[[_Order, LogRange], str]
) -> None:
    """One partition after the other; one that is refused does not keep the others from being repaired."""
    if not dry_run:
        check_reason(reason, "changelog deleted by mistake")
    settings = load_settings()
    counts = topic_partition_counts(settings.kafka, [USAGE_EVENTS, USAGE_WINDOWS, METERING_CHANGELOG])
    if unknown := [number for number in partitions if number >= counts[USAGE_EVENTS]]:
        raise UserError(f"{USAGE_EVENTS} has {counts[USAGE_EVENTS]} partitions, there is no {unknown[0]}")
    ranges = read_log_ranges(settings.kafka, USAGE_EVENTS, list(partitions))
    was_refused = repaired = False
    with LedgerAsker(settings.clickhouse) as asker:
        tools = RepairTools(settings.kafka, settings.metering, asker, counts[USAGE_WINDOWS])
        order = _Order(settings, tools, asker, reason, "" if dry_run else person(by))
        for number in dict.fromkeys(partitions):
            try:
                outcome = repair(order, ranges[number])
            except PartitionHalted as refusal:
                typer.echo(f"Refused: {refusal}", err=True)
                was_refused = True
                continue
            repaired = repaired or bool(outcome)
            typer.echo(f"partition {number}: {outcome or 'nothing to repair'}")
    if repaired and not dry_run:
        typer.echo(RESTART)
    if was_refused:
        raise typer.Exit(1)


def _show_state(plan: StatePlan) -> None:
    puts = sum(1 for _, value in plan.changelog if value is not None)
    typer.echo(
        f"partition {plan.log.partition}: {plan.why}\n"
        f"  state as of offset {plan.meta.applied_offset}, from the ledger: {puts} keys written, "
        f"{len(plan.changelog) - puts} deleted, {len(plan.outputs)} statements published\n"
        f"  {_account(plan.meta.counters, plan.meta.applied_offset)}"
    )


def _account(counters: Counters, applied: int) -> str:
    return (
        f"offsets {counters.first_offset}..{applied} = {counters.accepted} accepted + {counters.duplicates} "
        f"duplicates + {counters.dead_letters} dead letters + {counters.skipped} without a record + "
        f"{counters.unknown} not known"
    )


def _show_ledger(plan: LedgerPlan) -> None:
    ranges = ", ".join(f"{a}..{b}" if a != b else str(a) for a, b in plan.ranges)
    counters = plan.counters
    typer.echo(
        f"partition {plan.log.partition}: offsets {plan.first}..{plan.last} read again: {counters.accepted} "
        f"accepted, {counters.duplicates} duplicates, {counters.dead_letters} dead letters\n"
        f"  {plan.missing} rows missing, {format_credits(plan.credits_micro)} credits of {len(plan.totals)} "
        f"clients, at offsets {ranges}\n"
        f"  with them the ledger equals what was counted up to offset {plan.applied}"
    )


def _show_log(plan: LogPlan) -> None:
    typer.echo(
        f"partition {plan.log.partition}: {max(0, plan.last + 1 - plan.first)} offsets to fill "
        f"({plan.first}..{plan.last}); {plan.passed_by} events at counted offsets to be appended again"
    )


def _gap(text: str) -> tuple[int, int] | None:
    """Two offsets, `FROM..TO`.

    Raises:
        UserError: it is something else.
    """
    if not text:
        return None
    if not (parts := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", text)) or int(parts[1]) > int(parts[2]):
        raise UserError(f"--accept-gap {text!r} is no range of offsets. Write 1200..1299, as the halt says.")
    return int(parts[1]), int(parts[2])
