"""What has to change in a cluster so that its topics are as described. Pure: descriptions in, steps out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from meterline.contracts.topics import BROKER_DEFAULT, TopicSpec, followers_first, leaders_of
from meterline.errors import UserError

__all__ = ["Action", "LiveTopic", "Step", "plan_growth", "plan_topics", "with_recommended"]


class Action(StrEnum):
    """What can be done about a difference."""

    CREATE = "create"
    GROW = "grow"
    CONFIGURE = "configure"
    DRIFT = "drift"
    """Only a person can change it; Meterline works as it is."""
    REFUSED = "refused"
    """It must not be as it is, and must not be changed in place either."""


@dataclass(frozen=True, slots=True)
class LiveTopic:
    """A topic as the cluster has it; `replication_factor` is that of its least replicated partition."""

    name: str
    partitions: int
    replication_factor: int
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """One difference: `what` is `partitions`, `replication_factor` or the name of a topic setting."""

    action: Action
    topic: str
    what: str
    live: str
    wanted: str
    note: str = ""


def with_recommended(specs: Mapping[str, TopicSpec]) -> dict[str, TopicSpec]:
    """The same topics as a cluster of at least three brokers should have them."""
    return {
        name: replace(
            spec,
            replication_factor=spec.recommended.replication_factor,
            config=spec.config | spec.recommended.config,
        )
        for name, spec in specs.items()
    }


def plan_topics(specs: Mapping[str, TopicSpec], live: Mapping[str, LiveTopic]) -> list[Step]:
    """All steps, in the order in which they are safe: a follower grows before the topic it follows.

    Nothing is ever deleted or shrunk; topics and settings that no description names are left alone.
    """
    steps: list[Step] = []
    for spec in specs.values():
        wanted = _partitions(spec, specs, live)
        topic = live.get(spec.name)
        if topic is None:
            steps.append(Step(Action.CREATE, spec.name, "partitions", "", str(wanted)))
            continue
        steps += _partition_steps(spec, topic, wanted)
        steps += _replication_steps(spec, topic)
        steps += [
            _config_step(topic, key, value)
            for key, value in spec.config.items()
            if topic.config.get(key) != value
        ]
    return steps


def plan_growth(
    specs: Mapping[str, TopicSpec], live: Mapping[str, LiveTopic], name: str, partitions: int
) -> list[Step]:
    """The steps that give a topic, and before it all that follow it, so many partitions.

    Raises:
        UserError: the topic is none that is grown, or has more.
    """
    spec = specs.get(name)
    if spec is None:
        raise UserError(f"No description names {name}. There are: {', '.join(specs)}.")
    if spec.partitioned_like:
        first = leaders_of(specs, spec)[-1].name
        raise UserError(f"{name} always has as many partitions as {first}. Grow that one: this one follows.")
    if spec.fixed_partitions:
        raise UserError(f"{name} never changes its count: {spec.fixed_reason.strip()}")
    if name not in live:
        raise UserError(f"Kafka has no topic {name}. Create the topics with: meterline topics apply")
    if live[name].partitions > partitions:
        raise UserError(f"{name} has {live[name].partitions} partitions, and topics are never shrunk.")
    family = {one.name: replace(one, partitions=partitions) for one in followers_first(specs, name)}
    return [step for step in plan_topics(family, live) if step.action in {Action.CREATE, Action.GROW}]


def _partitions(spec: TopicSpec, specs: Mapping[str, TopicSpec], live: Mapping[str, LiveTopic]) -> int:
    """As described, or as many as a followed topic already has: each of its partitions needs one here."""
    leaders = (live.get(leader.name) for leader in leaders_of(specs, spec))
    return max([spec.partitions, *(leader.partitions for leader in leaders if leader is not None)])


def _partition_steps(spec: TopicSpec, topic: LiveTopic, wanted: int) -> list[Step]:
    if topic.partitions == wanted:
        return []
    if spec.fixed_partitions:
        action, note = Action.REFUSED, f"The count may never change: {spec.fixed_reason.strip()}"
    elif topic.partitions > wanted:
        action, note = Action.DRIFT, "Topics are never shrunk. Write the larger number into the description."
    else:
        action, note = Action.GROW, ""
    return [Step(action, spec.name, "partitions", str(topic.partitions), str(wanted), note)]


def _replication_steps(spec: TopicSpec, topic: LiveTopic) -> list[Step]:
    if spec.replication_factor in (BROKER_DEFAULT, topic.replication_factor):
        return []
    note = "Replicas are moved with Kafka's own kafka-reassign-partitions."
    live, wanted = str(topic.replication_factor), str(spec.replication_factor)
    return [Step(Action.DRIFT, spec.name, "replication_factor", live, wanted, note)]


def _config_step(topic: LiveTopic, key: str, value: str) -> Step:
    action, note = Action.CONFIGURE, ""
    if key == "min.insync.replicas" and int(value) > topic.replication_factor:
        # Kafka would take the setting, and from then on refuse every write.
        action, note = Action.DRIFT, f"Needs {value} replicas first: with fewer nothing could be written."
    return Step(action, topic.name, key, topic.config.get(key, ""), value, note)
