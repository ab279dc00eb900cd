"""The topics as data: `topics/<name>.yaml`, one file per topic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from meterline.contracts.files import topics_dir
from meterline.errors import UserError

__all__ = [
    "BILLING_CHANGELOG",
    "CLIENTS",
    "CREDIT_ALERTS",
    "CREDIT_GRANTS",
    "METERING_CHANGELOG",
    "QUOTA_CHANGELOG",
    "USAGE_EVENTS",
    "USAGE_EVENTS_DLQ",
    "USAGE_TOTALS",
    "USAGE_WINDOWS",
    "Recommended",
    "TopicSpec",
    "followers_first",
    "leaders_of",
    "load_topics",
]

USAGE_EVENTS = "usage.events"
USAGE_EVENTS_DLQ = "usage.events.dlq"
USAGE_WINDOWS = "usage.windows"
USAGE_TOTALS = "usage.totals"
CREDIT_GRANTS = "credit.grants"
CREDIT_ALERTS = "credit.alerts"
CLIENTS = "clients"
METERING_CHANGELOG = "metering-state-changelog"
BILLING_CHANGELOG = "billing-state-changelog"
QUOTA_CHANGELOG = "quota-state-changelog"

BROKER_DEFAULT = -1
"""Replication factor that leaves the choice to the broker, so that a cluster of one node works too."""


@dataclass(frozen=True, slots=True)
class Recommended:
    """What a cluster of at least three brokers should use; `meterline topics apply --recommended`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    replication_factor: int
    config: dict[str, str]


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """One topic.

    Attributes:
        schemas: names of the record schemas it carries; none for a changelog, whose bytes are private.
        key: what a record's key is.
        partitioned_like: the topic whose partition p writes or owns partition p here: always as many
            partitions as that one, and grown before it. That one may follow another.
        fixed_partitions: the count may never change; `fixed_reason` says why.
        replication_factor: -1 is the broker's default.
        config: topic settings in Kafka's words, each set explicitly because a broker's default may differ.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    name: str
    description: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    key: str
    partitions: int
    recommended: Recommended
    config: dict[str, str]
    schemas: tuple[str, ...] = ()
    partitioned_like: str = ""
    fixed_partitions: bool = False
    fixed_reason: str = ""
    replication_factor: int = BROKER_DEFAULT

    @property
    def max_message_bytes(self) -> int:
        """The largest record batch the broker takes, in bytes: a limit of records and producers' batches."""
        return int(self.config["max.message.bytes"])


def load_topics(directory: Path | None = None) -> dict[str, TopicSpec]:
    """All topics by name, in the order in which they are made and grown.

    A topic that follows another's partitions comes before it, and a state's changelog as the last one: while
    their counts differ, a rebalance may give a partition and its state to two workers.

    Raises:
        UserError: a file is no valid topic description, or two of them contradict each other.
    """
    folder = directory or topics_dir()
    specs = {spec.name: spec for spec in (_load(path) for path in sorted(folder.glob("*.yaml")))}
    if not specs:
        raise UserError(f"There are no topic descriptions in {folder}.")
    for spec in specs.values():
        _check(spec, specs)
    first = sorted(name for name, spec in specs.items() if not spec.partitioned_like)
    return {spec.name: spec for name in first for spec in followers_first(specs, name)}


def followers_first(specs: Mapping[str, TopicSpec], name: str) -> Iterator[TopicSpec]:
    """A topic behind all that follow it, directly or not."""
    direct = [spec for spec in specs.values() if spec.partitioned_like == name]
    for follower in sorted(direct, key=lambda spec: (not spec.schemas, spec.name)):
        yield from followers_first(specs, follower.name)
    yield specs[name]


def leaders_of(specs: Mapping[str, TopicSpec], spec: TopicSpec) -> list[TopicSpec]:
    """The topic it follows, the one that follows, and so on.

    Raises:
        UserError: one of them has no description, or they go round in a circle.
    """
    leaders: list[TopicSpec] = []
    last = spec
    while name := last.partitioned_like:
        last = specs.get(name, spec)
        if last is spec or last in leaders:
            raise UserError(f"{spec.name}: partitioned_like names {name!r}, which can't lead.")
        leaders.append(last)
    return leaders


def _load(path: Path) -> TopicSpec:
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
        spec = TypeAdapter(TopicSpec).validate_python(data)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise UserError(f"{path} is no valid topic description: {problems}") from error
    if path.stem != spec.name:
        raise UserError(f"{path} describes the topic {spec.name!r}: file and topic must have the same name.")
    return spec


def _check(spec: TopicSpec, specs: dict[str, TopicSpec]) -> None:
    if spec.partitions < 1:
        raise UserError(f"{spec.name}: partitions must be at least 1.")
    if spec.fixed_partitions and not spec.fixed_reason:
        raise UserError(f"{spec.name}: fixed_partitions needs a fixed_reason.")
    if "max.message.bytes" not in spec.config:
        raise UserError(f"{spec.name}: config needs max.message.bytes.")
    if not spec.partitioned_like:
        return
    leader = leaders_of(specs, spec)[-1]
    if (leader.partitions, leader.fixed_partitions) != (spec.partitions, spec.fixed_partitions):
        raise UserError(
            f"{spec.name} and {leader.name} must have the same number of partitions and both be fixed or not."
        )
