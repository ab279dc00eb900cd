"""The topics' descriptions are complete and agree with each other and with the schemas."""

from __future__ import annotations

import shutil

import pytest
import yaml

from meterline.contracts import topics
from meterline.contracts.files import topics_dir
from meterline.contracts.topics import USAGE_EVENTS, load_topics
from meterline.contracts.versions import schema_names
from meterline.errors import UserError

SPECS = load_topics()
NAMES = sorted(SPECS)
LARGE = (
    "usage.events.dlq",
    "usage.windows",
    "usage.totals",
    "metering-state-changelog",
    "billing-state-changelog",
    "quota-state-changelog",
)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(topics_dir(), tmp_path / "topics")


def change(folder, topic, fields):
    """Rewrite one description."""
    path = folder / f"{topic}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))


def test_every_topic_the_code_names_is_described():
    """And no other."""
    constants = {value for name, value in vars(topics).items() if name.isupper() and isinstance(value, str)}

    assert set(SPECS) == constants


def test_every_schema_is_on_exactly_one_topic():
    """Nobody has to guess what a topic carries."""
    assert schema_names() == sorted(name for spec in SPECS.values() for name in spec.schemas)


@pytest.mark.parametrize("name", NAMES)
def test_the_brokers_clock_rules_and_no_replica_that_lags_may_lead(name):
    """Rules ask the append time; acknowledged records are never given up."""
    config = SPECS[name].config

    assert config["message.timestamp.type"] == "LogAppendTime"
    assert config["unclean.leader.election.enable"] == "false"


@pytest.mark.parametrize("name", NAMES)
def test_one_broker_is_enough_and_three_are_recommended(name):
    """The local stack has one; production keeps acknowledged records on two."""
    spec = SPECS[name]

    assert (spec.replication_factor, "min.insync.replicas" in spec.config) == (-1, False)
    assert (spec.recommended.replication_factor, spec.recommended.config) == (3, {"min.insync.replicas": "2"})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_for_how_long_is_said_explicitly(name):
    """A broker's defaults expire, or never compact."""
    config = SPECS[name].config
    explicit = {
        "delete": {"retention.ms", "retention.bytes"},
        "compact": {"segment.ms", "min.cleanable.dirty.ratio"},
    }

    assert explicit[config["cleanup.policy"]] <= set(config)


@pytest.mark.parametrize("name", LARGE)
def test_what_a_source_record_becomes_has_room(name):
    """A dead letter holds the largest source record; state and windows outgrow single events."""
    assert SPECS[USAGE_EVENTS].max_message_bytes == 512 * 1024
    assert SPECS[name].max_message_bytes >= 2 * SPECS[USAGE_EVENTS].max_message_bytes


def test_followers_come_before_the_topic_they_follow():
    """Dead letters, totals and changelog grow before their source."""
    order = list(SPECS)
    followers = {name: spec.partitioned_like for name, spec in SPECS.items() if spec.partitioned_like}

    assert followers == {
        "usage.events.dlq": "usage.events",
        "usage.totals": "usage.events",
        "metering-state-changelog": "usage.events",
        "quota-state-changelog": "usage.totals",
        "billing-state-changelog": "usage.windows",
    }
    assert all(order.index(name) < order.index(leader) for name, leader in followers.items())


def test_counts_that_money_lives_by_are_fixed():
    """A client's windows, grants and registration must each stay in one partition."""
    fixed = {name for name, spec in SPECS.items() if spec.fixed_partitions}

    assert fixed == {"usage.windows", "billing-state-changelog", "credit.grants", "clients"}
    assert all(SPECS[name].fixed_reason for name in fixed)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("clients", {"partitions": 0}, "clients: partitions must be at least 1"),
        ("clients", {"fixed_reason": ""}, "clients: fixed_partitions needs a fixed_reason"),
        ("clients", {"config": {}}, r"clients: config needs max\.message\.bytes"),
        ("clients", {"partitons": 2}, r"clients\.yaml is no valid topic description: partitons"),
        ("clients", {"partitions": "many"}, r"clients\.yaml is no valid topic description: partitions"),
        ("clients", {"name": "client"}, "file and topic must have the same name"),
        ("usage.totals", {"partitions": 8}, "usage.totals and usage.events must have the same number"),
        ("usage.totals", {"partitioned_like": "usage.evnts"}, "partitioned_like names 'usage.evnts'"),
        ("usage.totals", {"partitioned_like": "quota-state-changelog"}, "which can't lead"),
    ],
)
def test_a_wrong_description_is_refused_with_file_and_field(folder, name, fields, message):
    """The person who wrote it sees where to look."""
    change(folder, name, fields)

    with pytest.raises(UserError, match=message):
        load_topics(folder)


def test_an_empty_folder_and_broken_yaml_are_refused(folder, tmp_path):
    """No topics is a mistake, not a plan to do nothing."""
    with pytest.raises(UserError, match="no topic descriptions"):
        load_topics(tmp_path)

    (folder / "clients.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"clients\.yaml is no valid YAML"):
        load_topics(folder)
