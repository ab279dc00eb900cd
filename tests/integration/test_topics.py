"""`meterline topics plan | apply` against a real broker."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import yaml
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from meterline.contracts.topic_admin import TopicAdmin
from meterline.contracts.topics import load_topics

pytestmark = pytest.mark.stack

IN_SYNC, MISTAKE, SOMETHING_TO_DO = 0, 2, 3
SETTLE_S = 10


class Described:
    """One topic of the test's own, as a description the command reads."""

    def __init__(self, stack, directory, name):
        self.stack, self.directory, self.name = stack, directory, name
        self.admin = AdminClient(stack.settings.kafka.client_config())

    def describe(self, **changes):
        description = {
            "name": self.name,
            "description": "One topic of a test.",
            "producers": ["test"],
            "consumers": ["test"],
            "key": "anything",
            "partitions": 2,
            "config": {"max.message.bytes": 1_000_000, "retention.ms": 3_600_000},
            "recommended": {"replication_factor": 3, "config": {"min.insync.replicas": 2}},
        } | changes
        (self.directory / f"{self.name}.yaml").write_text(yaml.safe_dump(description))

    def run(self, command):
        words = ["topics", command, "--json", "--topics-dir", str(self.directory)]
        done = subprocess.run(
            [sys.executable, "-c", "from meterline.cli.main import main; main()", *words],
            env=self.stack.process_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr

    def live(self):
        return TopicAdmin(self.stack.settings.kafka).describe([self.name]).get(self.name)

    def set_by_hand(self, key, value):
        entry = ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, self.name, incremental_configs=[entry])
        for answer in self.admin.incremental_alter_configs([resource]).values():
            answer.result()
        deadline = time.monotonic() + SETTLE_S
        while self.live().config[key] != value and time.monotonic() < deadline:
            time.sleep(0.05)


@pytest.fixture
def described(stack, tmp_path, unique):
    topic = Described(stack, tmp_path, unique("orders"))
    topic.describe()
    yield topic
    if topic.live() is not None:
        topic.admin.delete_topics([topic.name])[topic.name].result()


def test_the_packaged_topics_are_on_the_broker_as_described(settings):
    """The stack's fixture applied them; a plan of the same descriptions has no step left."""
    specs = load_topics()
    live = TopicAdmin(settings.kafka).describe(specs)

    assert {name: spec.partitions for name, spec in specs.items()} == {
        name: topic.partitions for name, topic in live.items()
    }
    assert [
        (name, key)
        for name, spec in specs.items()
        for key, value in spec.config.items()
        if live[name].config[key] != value
    ] == []


def test_plan_changes_nothing(described):
    """It says `create` with exit code 3, and the topic still isn't there."""
    code, report = described.run("plan")

    assert code == SOMETHING_TO_DO
    assert [(step["action"], step["wanted"]) for step in report["steps"]] == [("create", "2")]
    assert described.live() is None


def test_apply_creates_and_again_is_harmless(described):
    """The second time there is nothing to do, and plan agrees."""
    first_code, first = described.run("apply")

    assert first_code == IN_SYNC
    assert [step["action"] for step in first["done"]] == ["create"]
    assert described.live().partitions == 2
    assert described.live().config["retention.ms"] == "3600000"
    assert described.run("apply") == (IN_SYNC, {"done": [], "left": []})
    assert described.run("plan") == (IN_SYNC, {"in_sync": True, "steps": []})


def test_apply_grows_and_configures(described):
    """A larger count and another setting are brought to the broker."""
    described.run("apply")
    described.describe(partitions=5, config={"max.message.bytes": 1_000_000, "retention.ms": 7_200_000})
    code, report = described.run("apply")

    assert (code, report["left"]) == (IN_SYNC, [])
    assert [step["action"] for step in report["done"]] == ["grow", "configure"]
    assert described.live().partitions == 5
    assert described.live().config["retention.ms"] == "7200000"


def test_a_topic_is_never_shrunk(described):
    """A smaller count is reported as drift with exit code 3, and every partition stays."""
    described.describe(partitions=4)
    described.run("apply")
    described.describe(partitions=2)
    code, report = described.run("apply")

    assert code == SOMETHING_TO_DO
    assert [(step["action"], step["live"]) for step in report["left"]] == [("drift", "4")]
    assert described.live().partitions == 4


def test_a_topic_without_a_description_is_never_deleted(described, unique):
    """Taking a file away, or having others' topics on the cluster, touches none of them."""
    described.run("apply")
    (described.directory / f"{described.name}.yaml").unlink()
    other = Described(described.stack, described.directory, unique("other"))
    other.describe()
    code, report = other.run("apply")
    stayed = described.live()
    other.admin.delete_topics([other.name])[other.name].result()

    assert code == IN_SYNC
    assert [step["topic"] for step in report["done"]] == [other.name]
    assert stayed.partitions == 2


def test_a_setting_changed_by_hand_is_reported_and_brought_back(described):
    """Drift is seen by plan with both values; apply sets what the description says."""
    described.run("apply")
    described.set_by_hand("retention.ms", "1000")
    code, report = described.run("plan")

    assert code == SOMETHING_TO_DO
    assert [(step["what"], step["live"], step["wanted"]) for step in report["steps"]] == [
        ("retention.ms", "1000", "3600000")
    ]
    assert described.run("apply")[0] == IN_SYNC
    assert described.live().config["retention.ms"] == "3600000"


def test_a_setting_no_description_names_stays(described):
    """Somebody's own tuning of a topic is none of our business."""
    described.run("apply")
    described.set_by_hand("segment.ms", "60000")

    assert described.run("apply") == (IN_SYNC, {"done": [], "left": []})
    assert described.live().config["segment.ms"] == "60000"


def test_a_fixed_topic_is_refused_before_anything_changes(described):
    """Money lives by its count: exit code 2, the reason, and also its other differences stay."""
    described.run("apply")
    described.describe(
        partitions=3,
        fixed_partitions=True,
        fixed_reason="State lives by it.",
        config={"max.message.bytes": 1_000_000, "retention.ms": 1_000},
    )
    code, said = described.run("apply")

    assert code == MISTAKE
    assert "State lives by it." in said
    assert described.live().partitions == 2
    assert described.live().config["retention.ms"] == "3600000"
