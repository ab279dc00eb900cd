"""Where the tests that need Kafka, ClickHouse, Redis and Stripe find them: local processes, or containers.

METERLINE_TEST_STACK=docker runs the images of docker-compose.yml; otherwise the local stack runs in a
temporary directory, on free ports.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest
import yaml
from docker.errors import DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import HttpWaitStrategy, LogMessageWaitStrategy

from meterline.contracts.topic_admin import TopicAdmin
from meterline.contracts.topics import load_topics
from meterline.ledger.migrate import apply_migrations
from meterline.local.kafka import BROKER_SETTINGS
from meterline.local.ports import HOST, Ports
from meterline.local.python_services import ClickHouse
from meterline.local.redis import SERVER_SETTINGS
from meterline.local.sandbox.process import SandboxProcess
from meterline.local.stack import Stack
from meterline.settings import Settings

__all__ = ["RunningStack", "chosen_kind", "own_stack", "running_stack", "settings_of"]

CHOICE_VARIABLE = "METERLINE_TEST_STACK"
COMPOSE_FILE = Path(__file__).parents[1] / "docker-compose.yml"
CONTAINER_START_S = 120


@dataclass(frozen=True, slots=True)
class RunningStack:
    """A stack with its topics and migrations applied.

    Attributes:
        kind: `local` or `docker`.
        environment: the variables that point a process at it.
        settings: the same, read.
        local: the local stack's own object, to stop and start its services; None with containers.
    """

    kind: str
    environment: Mapping[str, str]
    settings: Settings
    local: Stack | None

    @contextmanager
    def without_clickhouse(self) -> Iterator[None]:
        """Until the end of the block there is no ledger. The local stack's alone: containers are not ours."""
        if self.local is None:
            pytest.skip("stops the local stack's ClickHouse; containers are run by testcontainers")
        where = self.local.state_dir, self.local.ports
        ledger = Stack(*where, [ClickHouse(where[0] / "clickhouse", where[1])])
        ledger.down()
        try:
            yield
        finally:
            ledger.up()

    def process_environment(self) -> dict[str, str]:
        """For a child process: our environment, its settings of Meterline replaced by this stack's."""
        return _without_settings(os.environ) | dict(self.environment)


def chosen_kind() -> str:
    """`local` or `docker`; the session ends at once if it can't be had.

    Raises:
        pytest.UsageError: another word, or containers without a container engine.
    """
    kind = os.environ.get(CHOICE_VARIABLE, "local")
    if kind not in {"local", "docker"}:
        raise pytest.UsageError(f"{CHOICE_VARIABLE} is {kind!r}; it must be local or docker")
    if kind == "docker":
        try:
            docker.from_env(timeout=5).ping()
        except (DockerException, OSError) as error:
            raise pytest.UsageError(
                f"{CHOICE_VARIABLE}=docker, but no container engine answers ({error}). "
                f"Start one, or unset {CHOICE_VARIABLE}: the local stack needs none."
            ) from None
    return kind


@contextmanager
def running_stack(kind: str) -> Iterator[RunningStack]:
    """Start a stack, ready to be used; stop and remove it however this ends."""
    with (_local_stack if kind == "local" else _containers)() as (environment, local):
        settings = settings_of(environment)
        TopicAdmin(settings.kafka).apply(load_topics())
        apply_migrations(settings.clickhouse)
        yield RunningStack(kind, environment, settings, local)


def own_stack(kind: str | None = None) -> object:
    """The fixture `stack` of a module that breaks services, or counts every record of the topics."""

    @pytest.fixture(scope="module")
    def stack() -> Iterator[RunningStack]:
        with running_stack(kind or chosen_kind()) as running:
            yield running

    return stack


def settings_of(environment: Mapping[str, str]) -> Settings:
    """The settings a process with these variables would read."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - _without_settings(os.environ).keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        return Settings()


def _without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("METERLINE_")}


@contextmanager
def _local_stack() -> Iterator[tuple[dict[str, str], Stack]]:
    with tempfile.TemporaryDirectory(prefix="meterline-test-") as directory:
        stack = Stack(Path(directory) / "stack", Ports.free())
        try:
            stack.up()
            yield stack.environment(), stack
        finally:
            stack.down(wipe=True)


@contextmanager
def _containers() -> Iterator[tuple[dict[str, str], None]]:
    """The official images, and the sandbox as a process of ours. The ports are the host's, all free ones."""
    ports = Ports.free()
    with ExitStack() as running:
        directory = running.enter_context(tempfile.TemporaryDirectory(prefix="meterline-test-"))
        for container in (_kafka(ports.kafka), _clickhouse(ports), _valkey(ports.redis)):
            running.enter_context(container)
        sandbox = running.enter_context(SandboxProcess.start(Path(directory)))
        environment = {
            "METERLINE_KAFKA__BOOTSTRAP_SERVERS": f"{HOST}:{ports.kafka}",
            "METERLINE_CLICKHOUSE__HOST": HOST,
            "METERLINE_CLICKHOUSE__PORT": str(ports.clickhouse),
            "METERLINE_REDIS__URL": f"redis://{HOST}:{ports.redis}/0",
            "METERLINE_STRIPE__SANDBOX_URL": sandbox.url,
        }
        yield environment, None


def _kafka(port: int) -> DockerContainer:
    """One KRaft node. testcontainers' own KafkaContainer knows Confluent's image only."""
    container = _container("kafka").with_bind_ports(port, port)
    variables = {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_LISTENERS": f"PLAINTEXT://:{port},CONTROLLER://:9093",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://{HOST}:{port}",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        **{f"KAFKA_{name.replace('.', '_').upper()}": value for name, value in BROKER_SETTINGS.items()},
    }
    for name, value in variables.items():
        container.with_env(name, value)
    started = LogMessageWaitStrategy("Kafka Server started").with_startup_timeout(CONTAINER_START_S)
    return container.waiting_for(started)


def _clickhouse(ports: Ports) -> DockerContainer:
    container = _container("clickhouse").with_bind_ports(9_000, ports.clickhouse)
    container.with_bind_ports(8_123, ports.clickhouse_http)
    # The image shuts out the user `default` unless told that nobody else can reach it.
    container.with_env("CLICKHOUSE_SKIP_USER_SETUP", "1")
    answers = HttpWaitStrategy(8_123, "/ping").with_startup_timeout(CONTAINER_START_S)
    return container.waiting_for(answers)


def _valkey(port: int) -> DockerContainer:
    options = [part for name, value in SERVER_SETTINGS.items() for part in (f"--{name}", value or '""')]
    container = _container("redis").with_bind_ports(6_379, port)
    container.with_command(" ".join(["valkey-server", *options]))
    ready = LogMessageWaitStrategy("Ready to accept connections").with_startup_timeout(CONTAINER_START_S)
    return container.waiting_for(ready)


def _container(service: str) -> DockerContainer:
    """The image that docker-compose.yml names for a service."""
    return DockerContainer(yaml.safe_load(COMPOSE_FILE.read_text())["services"][service]["image"])
