"""`meterline topics`: what the cluster's topics lack, and bringing them there.

Exit codes: 0 all as described; 1 Kafka is away; 2 a mistake, or a topic that can't be brought there; 3 there
is something to do (`plan`), or something left that only a person can do (`apply`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from meterline.contracts.topic_admin import TopicAdmin
from meterline.contracts.topic_plan import Step, plan_topics, with_recommended
from meterline.contracts.topics import TopicSpec, load_topics
from meterline.settings import load_settings

__all__ = ["app"]

SOMETHING_TO_DO = 3

app = typer.Typer(help="Plan and apply the Kafka topics.", no_args_is_help=True)

Directory = Annotated[
    Path | None,
    typer.Option("--topics-dir", help="Your own copy of the topic descriptions.", file_okay=False),
]
Recommended = Annotated[
    bool, typer.Option("--recommended", help="Replication for a cluster of at least three brokers.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def plan(directory: Directory = None, recommended: Recommended = False, as_json: AsJson = False) -> None:
    """Show what `apply` would do, and what it can't. Exit code 3 if there is anything."""
    specs = _specs(directory, recommended=recommended)
    steps = plan_topics(specs, TopicAdmin(load_settings().kafka).describe(specs))
    if as_json:
        print(json.dumps({"in_sync": not steps, "steps": [asdict(step) for step in steps]}, indent=2))
    elif steps:
        Console().print(_table("Topics to bring to their description", steps))
    else:
        print(f"All {len(specs)} topics are as described.")
    raise typer.Exit(SOMETHING_TO_DO if steps else 0)


@app.command()
def apply(directory: Directory = None, recommended: Recommended = False, as_json: AsJson = False) -> None:
    """Create, grow and configure the topics. Never deletes, never shrinks; again is harmless."""
    specs = _specs(directory, recommended=recommended)
    done, left = TopicAdmin(load_settings().kafka).apply(specs)
    if as_json:
        report = {"done": [asdict(step) for step in done], "left": [asdict(step) for step in left]}
        print(json.dumps(report, indent=2))
    else:
        if done:
            Console().print(_table("Done", done))
        if left:
            Console().print(_table("Left to you", left))
        else:
            print(f"All {len(specs)} topics are as described.")
    raise typer.Exit(SOMETHING_TO_DO if left else 0)


@app.command()
def grow(
    topic: Annotated[
        str, typer.Argument(help="The topic; those that follow it grow with it, and before it.")
    ],
    partitions: Annotated[int, typer.Argument(min=1, help="How many it shall have.")],
    directory: Directory = None,
    as_json: AsJson = False,
) -> None:
    """Add partitions to a live topic. Workers share them within a minute; again is harmless."""
    specs = load_topics(directory)
    done = TopicAdmin(load_settings().kafka).grow(specs, topic, partitions)
    if as_json:
        print(json.dumps({"done": [asdict(step) for step in done]}, indent=2))
    elif done:
        Console().print(_table("Done", done))
    else:
        print(f"{topic} and what follows it have {partitions} partitions.")
    if specs[topic].partitions < partitions and not as_json:
        print(
            f"Write {partitions} into the descriptions, too: `meterline topics plan` reports the difference."
        )


def _specs(directory: Path | None, *, recommended: bool) -> dict[str, TopicSpec]:
    specs = load_topics(directory)
    return with_recommended(specs) if recommended else specs


def _table(title: str, steps: Sequence[Step]) -> Table:
    table = Table("action", "topic", "what", "now", "described", "note", title=title, title_justify="left")
    for step in steps:
        table.add_row(step.action.value, step.topic, step.what, step.live, step.wanted, step.note)
    return table
