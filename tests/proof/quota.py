"""`make prove-quota`: eight processes race for a million credits, are killed, stalled, lose Redis and Kafka.

What they do is counted by their own logs, and judged by a checker that shares no code with the product
(`quota_checker.py`): never more than granted but for the listed terms, and nothing left behind.

    punctual   reserve, settle in parts, void, renew, re-runs, conflicts, cancellation; kill -9 anywhere.
               No task outlives its reservation: every term of the bound must be 0
    late       tasks that outlive their reservations, cost more than was reserved, or never reserved:
               the bound holds with those terms
    leases     the same decided from leases, whose holders are killed and stopped beyond their deadlines
    killed     Redis is killed under load and started again
    flushed    Redis is flushed with 400 reservations open and usage in flight; `meterline quota rebuild`
    kafka      Kafka is away for a minute while tasks finish, and their workers are killed
    oversell   planted: more credits in Redis than the log grants must be reported, with the amount
    leak       planted: provisional credits that nothing ends must be reported, with the amount
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import typer
from tests.proof.disasters import FlushedRedis, KafkaAway, KilledRedis
from tests.proof.pipeline import Pipeline, running_pipeline
from tests.proof.plants import PLANTS
from tests.proof.race import Race, Rules, run_race

TTL_MAX_S = 20.0
"""After a lost Redis the buckets stay closed so long, and leftover holds stand so long after a race."""
PUNCTUAL = Rules("punctual", ttl_s=TTL_MAX_S)
LATE = Rules("late", ttl_s=2.0, late=True, concurrency=32, kills_each=3).scaled(8, 150)
LEASES = Rules("leases", ttl_s=3.0, lease_ttl_s=3.0, concurrency=24, kills_each=3, stalls=6, stall_s=8.0)
KILLED = Rules("killed", ttl_s=TTL_MAX_S, kills_each=2, outside=3).scaled(8, 150)
FLUSHED = Rules(
    "flushed", ttl_s=TTL_MAX_S, concurrency=80, pause_s=3.0, kills=(), kills_each=0, outside=0
).scaled(8, 250)
PLANTED = Rules("planted", ttl_s=5.0, kills=(), kills_each=0, outside=0).scaled(8, 60)
SHORT = {"ttl_s": 12.0, "concurrency": 6, "kills_each": 2, "kill_within": 4, "outside": 2}
SHORT_LEASES = {
    "lease_share": 0.1,
    "kills_each": 2,
    "kill_within": 4,
    "outside": 1,
    "stalls": 1,
    "stall_s": 6.0,
}

NAMES = ("punctual", "late", "leases", "killed", "flushed", "kafka", *PLANTS)
SHORT_NAMES = ("punctual", "leases")


def prove(
    *,
    short: Annotated[bool, typer.Option(help="Four processes, 60 tasks each, without disasters.")] = False,
    plant: Annotated[str, typer.Option(help=f"Only one race, with a mistake: {' or '.join(PLANTS)}.")] = "",
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(NAMES)}; with commas.")] = "",
) -> None:
    """Exit code 0: credits are conserved, and the planted mistakes were reported. 1: something is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything started is stopped, as on Ctrl-C
    names = [plant] if plant else only.split(",") if only else SHORT_NAMES if short else NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise typer.BadParameter(f"{unknown} is none of {', '.join(NAMES)}")
    began, failed = time.monotonic(), []
    with running_pipeline(TTL_MAX_S) as pipeline:
        for name in names:
            try:
                problems = _run(pipeline, name, short=short)
            except Exception as error:  # noqa: BLE001 - the others are run all the same
                problems = [f"{name} could not be run: {error!r}"]
            if name in PLANTS and not plant:
                problems = _reported(name, problems)
            for problem in problems:
                typer.echo(f"  PROBLEM {problem}")
            failed += [name] if problems else []
        if failed:
            typer.echo(f"the logs are in {pipeline.folder}")
        else:
            pipeline.forget_logs()
    outcome = f"wrong: {', '.join(failed)}" if failed else "proved"
    typer.echo(f"quota: {outcome} ({time.monotonic() - began:.0f} s)")
    raise typer.Exit(1 if failed else 0)


def _run(pipeline: Pipeline, name: str, *, short: bool) -> Sequence[str]:
    """One of the names; what was found wrong."""
    if name == "kafka":
        return _kafka_away(pipeline)
    if name in PLANTS:
        race = run_race(pipeline, replace(PLANTED, name=name), plant=PLANTS[name][0])
        _tell(race)
        return race.verdict.problems
    disaster: Callable[..., None] = {"killed": KilledRedis, "flushed": FlushedRedis}.get(name, _Nothing)()
    rules = {"punctual": PUNCTUAL, "late": LATE, "leases": LEASES, "killed": KILLED, "flushed": FLUSHED}[name]
    if short:
        rules = replace(rules.scaled(4, 60), **(SHORT_LEASES if name == "leases" else SHORT))
    race = run_race(pipeline, rules, meanwhile=disaster)
    problems = [*race.verdict.problems, *disaster.problems, *_not_met(race, disaster)]
    problems += pipeline.check()
    _tell(race, disaster.happened)
    return problems


class _Nothing:
    """No disaster."""

    happened = ""
    problems: tuple[str, ...] = ()

    def __call__(self, *_: object) -> None:
        pass


def _not_met(race: Race, disaster: object) -> list[str]:
    """A run in which nothing happened of what it is about proves nothing."""
    terms, problems = race.verdict.terms, []
    if race.rules.late:
        problems += [
            f"no credits of the term {name}"
            for name in ("late", "above", "unreserved")
            if not getattr(terms, name)
        ]
    if race.rules.stalls and not race.notes["lapsed_leases"]:
        problems.append("no lease lapsed")
    if not isinstance(disaster, _Nothing):
        if not disaster.happened:
            problems.append("the disaster did not happen")
        elif race.notes["generations"] < 2:
            problems.append("the loss of Redis was not noticed: one generation only")
    return problems


def _tell(race: Race, happened: str = "") -> None:
    verdict = race.verdict
    typer.echo(f"{race.rules.name}: {verdict.summary}")
    kills = " ".join(f"{kind}={count}" for kind, count in sorted(race.kills.items())) or "none"
    notes = " ".join(f"{name}={value}" for name, value in race.notes.items())
    typer.echo(f"  killed {race.kills.total()} times: {kills}; stalled {race.stalled} times; {notes}")
    typer.echo(f"  {race.seconds:.1f} s{'; ' if happened else ''}{happened}")


def _kafka_away(pipeline: Pipeline) -> list[str]:
    away = KafkaAway(pipeline)
    verdict = away.run()
    typer.echo(f"kafka: {verdict.summary}")
    typer.echo(
        f"  {away.finished_meanwhile} tasks were finished while Kafka was away; workers killed "
        f"{away.kills.total()} times; pipeline workers restarted {dict(pipeline.restarts)}"
    )
    return [*verdict.problems, *pipeline.check()]


def _reported(name: str, problems: Sequence[str]) -> list[str]:
    """Whether the checker said what is wrong, and how much."""
    text = PLANTS[name][1]
    found = [problem for problem in problems if text in problem]
    if not found:
        return [f"the planted {name} was not reported ({text!r}): {list(problems)}"]
    for problem in problems:
        typer.echo(f"  planted and reported: {problem}")
    return []


if __name__ == "__main__":
    typer.run(prove)
