"""What a cluster lacks, as steps: nothing is deleted, shrunk, or grown that must not grow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meterline.contracts.topic_plan import (
    Action,
    LiveTopic,
    Step,
    plan_growth,
    plan_topics,
    with_recommended,
)
from meterline.contracts.topics import load_topics
from meterline.errors import UserError

SPECS = load_topics()
SOURCE = "usage.events"
AS_DESCRIBED = {
    name: LiveTopic(name, spec.partitions, 1, spec.config | {"retention.bytes": "-1", "x.y": "1"})
    for name, spec in SPECS.items()
}


def live(name, **change):
    return AS_DESCRIBED | {name: replace(AS_DESCRIBED[name], **change)}


def test_nothing_to_do_is_no_step():
    """Settings and topics that no description names are left alone."""
    other = LiveTopic("orders", 1, 1, {})

    assert plan_topics(SPECS, AS_DESCRIBED | {"orders": other}) == []


def test_missing_topics_are_created_followers_first():
    """A source without its dead-letter partition could not be metered."""
    steps = plan_topics(SPECS, {})

    assert [step.topic for step in steps] == list(SPECS)
    assert {step.action for step in steps} == {Action.CREATE}


def test_a_new_follower_has_a_partition_for_each_of_its_leaders():
    """The source may have grown beyond its description."""
    cluster = live("usage.events", partitions=8)
    del cluster["usage.events.dlq"]

    assert Step(Action.CREATE, "usage.events.dlq", "partitions", "", "8") in plan_topics(SPECS, cluster)


def test_growth_is_in_the_safe_order():
    """dlq, totals and changelog before the source, each state right before what it is the state of."""
    family = ["usage.events.dlq", "quota-state-changelog", "usage.totals", "metering-state-changelog", SOURCE]
    wanted = SPECS | {name: replace(SPECS[name], partitions=8) for name in family}
    steps = plan_topics(wanted, AS_DESCRIBED)

    assert {(step.action, step.live, step.wanted) for step in steps} == {(Action.GROW, "4", "8")}
    assert [step.topic for step in steps] == family
    assert plan_growth(SPECS, AS_DESCRIBED, SOURCE, 8) == steps


def test_growth_that_ended_in_the_middle_goes_on():
    """And a follower that was never made is made with the count it needs."""
    cluster = live("usage.events.dlq", partitions=8)
    del cluster["metering-state-changelog"]
    steps = plan_growth(SPECS, cluster, SOURCE, 8)

    assert [(step.action, step.topic, step.wanted) for step in steps] == [
        (Action.GROW, "quota-state-changelog", "8"),
        (Action.GROW, "usage.totals", "8"),
        (Action.CREATE, "metering-state-changelog", "8"),
        (Action.GROW, SOURCE, "8"),
    ]


@pytest.mark.parametrize(
    ("name", "partitions", "why"),
    [
        ("usage.events.dlq", 8, "as many partitions as usage.events. Grow that one"),
        ("quota-state-changelog", 8, "as many partitions as usage.events. Grow that one"),
        ("usage.windows", 8, "usage.windows never changes its count"),
        ("usage.evnts", 8, "No description names usage.evnts"),
        (SOURCE, 3, "never shrunk"),
    ],
)
def test_what_must_not_grow_alone_or_at_all_is_refused(name, partitions, why):
    """With the reason, and the topic to grow instead."""
    with pytest.raises(UserError, match=why):
        plan_growth(SPECS, AS_DESCRIBED, name, partitions)


def test_a_topic_that_is_not_there_is_not_grown():
    """Created first, with its settings."""
    with pytest.raises(UserError, match="meterline topics apply"):
        plan_growth(SPECS, {}, SOURCE, 8)


def test_followers_catch_up_with_a_source_that_somebody_grew():
    """Growing the source alone is the accident to repair; the source itself is reported."""
    steps = {step.topic: step.action for step in plan_topics(SPECS, live("usage.events", partitions=8))}

    assert steps == {
        "metering-state-changelog": Action.GROW,
        "quota-state-changelog": Action.GROW,
        "usage.events.dlq": Action.GROW,
        "usage.totals": Action.GROW,
        "usage.events": Action.DRIFT,
    }


@pytest.mark.parametrize("partitions", [3, 5])
def test_a_fixed_topic_is_refused_whichever_way_it_differs(partitions):
    """Money lives by the count."""
    (step,) = plan_topics(SPECS, live("credit.grants", partitions=partitions))

    assert step.action is Action.REFUSED
    assert "The first record in the log wins" in step.note


def test_a_topic_is_never_shrunk():
    """Kafka can't, and records would be lost."""
    (step,) = plan_topics(SPECS, live("credit.alerts", partitions=9))

    assert (step.action, step.live, step.wanted) == (Action.DRIFT, "9", "4")


def test_a_setting_that_differs_or_is_missing_is_set():
    """One step for each, with both values."""
    config = {key: value for key, value in SPECS["clients"].config.items() if key != "segment.ms"}
    steps = plan_topics(SPECS, live("clients", config=config | {"cleanup.policy": "delete"}))

    assert steps == [
        Step(Action.CONFIGURE, "clients", "cleanup.policy", "delete", "compact"),
        Step(Action.CONFIGURE, "clients", "segment.ms", "", "86400000"),
    ]


def test_recommended_replication_is_a_persons_work():
    """And two in sync are not demanded of one replica: every write would be refused from then on."""
    specs = {"clients": with_recommended(SPECS)["clients"]}
    steps = plan_topics(specs, live("clients", config=SPECS["clients"].config | {"min.insync.replicas": "1"}))

    assert [(step.action, step.what, step.live, step.wanted) for step in steps] == [
        (Action.DRIFT, "replication_factor", "1", "3"),
        (Action.DRIFT, "min.insync.replicas", "1", "2"),
    ]


def test_recommended_settings_are_made_where_the_replicas_are():
    """Three replicas, and only the setting is missing."""
    specs = {"clients": with_recommended(SPECS)["clients"]}
    (step,) = plan_topics(specs, live("clients", replication_factor=3))

    assert (step.action, step.what, step.wanted) == (Action.CONFIGURE, "min.insync.replicas", "2")
