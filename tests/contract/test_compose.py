"""docker-compose.yml is valid, and is the local stack: same services, ports and settings."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from meterline.local.kafka import BROKER_SETTINGS, HEAP_MAX
from meterline.local.kafka_jars import KAFKA_VERSION
from meterline.local.ports import HOST, Ports
from meterline.local.redis import SERVER_SETTINGS
from meterline.settings import SANDBOX_API_KEY, Settings

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(Path(__file__).with_name("compose-spec.json").read_text())

DEFAULT = re.compile(r"\$\{\w+:-(?P<default>[^}]*)\}")
EXACT_TAG = re.compile(r"[\w./-]+:\d+\.\d+\.\d+(\.\d+)?(-[\w.-]+)?")
ONE_SHOT = {"setup"}
NODE_SETTINGS = {
    "CLUSTER_ID",
    "KAFKA_ADVERTISED_LISTENERS",
    "KAFKA_CONTROLLER_LISTENER_NAMES",
    "KAFKA_CONTROLLER_QUORUM_VOTERS",
    "KAFKA_HEAP_OPTS",
    "KAFKA_INTER_BROKER_LISTENER_NAME",
    "KAFKA_LISTENERS",
    "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP",
    "KAFKA_LOG_DIRS",
    "KAFKA_NODE_ID",
    "KAFKA_PROCESS_ROLES",
}
"""What says where a node is, not how it behaves."""


def interpolated(node):
    """The node as compose reads it where no variable is set."""
    if isinstance(node, dict):
        return {key: interpolated(value) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolated(value) for value in node]
    return DEFAULT.sub(lambda match: match["default"], node) if isinstance(node, str) else node


TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = interpolated(yaml.safe_load(TEXT))
SERVICES = COMPOSE["services"]
LONG_RUNNING = sorted(set(SERVICES) - ONE_SHOT)


def published(name):
    """Container port -> host port of a service."""
    ports = [port.split(":") for port in SERVICES[name].get("ports", [])]
    return {int(inside): int(outside) for _, outside, inside in ports}


def settings_of(name):
    """The METERLINE_ variables of a service."""
    variables = SERVICES[name].get("environment", {}).items()
    return {key: value for key, value in variables if key.startswith("METERLINE_")}


def test_the_file_is_a_compose_file():
    """It validates against the compose specification's own schema."""
    errors = [f"{error.json_path}: {error.message}" for error in Draft7Validator(SCHEMA).iter_errors(COMPOSE)]

    assert errors == []


def test_the_ports_are_those_of_the_local_stack():
    """A command that works after `meterline up` works after `docker compose up`."""
    kafka, clickhouse, redis, stripe = map(published, ("kafka", "clickhouse", "redis", "stripe"))
    inside = Ports().kafka  # the host's listener has one number on both sides
    stack = asdict(Ports())
    del stack["kafka_controller"]  # the node's own business, open to nobody

    assert stack == {
        "kafka": kafka[inside],
        "clickhouse": clickhouse[9000],
        "clickhouse_http": clickhouse[8123],
        "redis": redis[6379],
        "stripe": stripe[12111],
    }


def test_every_stack_port_is_moved_by_the_variable_of_the_local_stack():
    """METERLINE_PORT_KAFKA=... means the same to both."""
    variables = set(re.findall(r"METERLINE_PORT_\w+(?=:-)", TEXT))
    stack = {f"METERLINE_PORT_{name.upper()}" for name in asdict(Ports()) if name != "kafka_controller"}

    of_compose_alone = {f"METERLINE_PORT_{name}" for name in ("REGISTRY", "BILLING_WEB", "QUOTA_WEB")}
    assert stack == variables - of_compose_alone


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_published_ports_are_on_loopback_and_free_of_each_other(name):
    """Nothing here has a password, so nothing is reachable from another machine."""
    ports = SERVICES[name].get("ports", [])
    others = [port for other in SERVICES if other != name for port in published(other).values()]

    assert [HOST] * len(ports) == [port.split(":")[0] for port in ports]
    assert set() == set(published(name).values()) & set(others)


def test_clients_find_kafka_from_the_host_and_from_containers():
    """Each side is told an address that it can reach."""
    advertised = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]

    assert f"PLAINTEXT://kafka:9092,HOST://{HOST}:{Ports().kafka}" == advertised


def test_kafka_behaves_as_in_the_local_stack():
    """Every broker setting, and no other; same version, same heap."""
    environment = SERVICES["kafka"]["environment"]
    behaviour = {name: value for name, value in environment.items() if name not in NODE_SETTINGS}
    expected = {f"KAFKA_{name.replace('.', '_').upper()}": value for name, value in BROKER_SETTINGS.items()}

    assert expected == behaviour
    assert f"apache/kafka:{KAFKA_VERSION}" == SERVICES["kafka"]["image"]
    assert environment["KAFKA_HEAP_OPTS"].endswith(f"-Xmx{HEAP_MAX}")


def test_redis_behaves_as_in_the_local_stack():
    """Credit buckets are kept and never evicted here too."""
    program, *options = SERVICES["redis"]["command"]
    settings = dict(zip(options[::2], options[1::2], strict=True))

    assert program == "valkey-server"
    assert {f"--{name}": value for name, value in SERVER_SETTINGS.items()} == settings


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_image_has_an_exact_version(name):
    """What ran yesterday runs tomorrow: no `latest`, no floating major or minor."""
    assert EXACT_TAG.fullmatch(SERVICES[name]["image"])


def test_the_base_image_has_an_exact_version():
    """For the image we build ourselves too, the same in every stage."""
    bases = re.findall(r"^FROM (\S+)", (ROOT / "infra" / "Dockerfile").read_text(), re.MULTILINE)

    assert len(set(bases)) == 1
    assert EXACT_TAG.fullmatch(bases[0])


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_every_service_that_stays_has_a_health_check_a_restart_and_time_to_stop(name):
    """A dependant waits for health, a crash is followed by a start, a stop by an orderly end."""
    service = SERVICES[name]

    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"] == "30s"


@pytest.mark.parametrize(("name", "port"), [("metering", 6066), ("billing", 6067), ("quota", 6068)])
def test_a_worker_is_asked_for_liveness_on_its_own_port(name, port):
    """Readiness waits for other services; it is no reason to call a worker unhealthy."""
    assert f"'http://127.0.0.1:{port}/healthz/live'" in SERVICES[name]["healthcheck"]["test"][-1]
    assert str(port) == settings_of(name)["METERLINE_WORKER__WEB_PORT"]
    assert settings_of(name)["METERLINE_WORKER__WEB_HOST"] == "0.0.0.0"


@pytest.mark.parametrize("name", ["metering", "billing", "quota", "audit"])
def test_a_worker_starts_after_what_it_needs(name):
    """Topics and tables are there before the first worker asks for them."""
    conditions = {other: wait["condition"] for other, wait in SERVICES[name]["depends_on"].items()}

    assert conditions.pop("setup") == "service_completed_successfully"
    assert set(conditions.values()) == {"service_healthy"}
    assert {"kafka", "clickhouse"} <= set(conditions)


@pytest.mark.parametrize("name", ["setup", "metering", "billing", "quota", "audit"])
def test_every_setting_is_a_real_one_and_points_at_a_service(name, monkeypatch):
    """A misspelt variable would be ignored, and the default, the host's loopback, would be used."""
    variables = settings_of(name)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    loaded = Settings().model_dump()

    for variable, value in variables.items():
        section, field = variable.removeprefix("METERLINE_").lower().split("__")
        found = loaded[section][field]
        plain = getattr(found, "get_secret_value", lambda found=found: found)()
        assert value == (str(plain).lower() if isinstance(plain, bool) else str(plain))
    assert Settings().kafka.bootstrap_servers.split(":")[0] in SERVICES
    assert Settings().clickhouse.host in SERVICES
    assert Settings().redis.url == "redis://redis:6379/0"
    assert Settings().stripe.sandbox_url == "http://stripe:12111"


def test_without_a_key_billing_speaks_to_the_sandbox():
    """Nobody's Stripe account is touched by a first `docker compose up`."""
    assert settings_of("billing")["METERLINE_STRIPE__API_KEY"] == SANDBOX_API_KEY


def test_the_sandbox_is_asked_where_it_answers():
    """The local stack asks the same page; another one wants an API key."""
    assert "'http://127.0.0.1:12111/healthz'" in SERVICES["stripe"]["healthcheck"]["test"][-1]


def test_the_registry_is_started_only_on_request():
    """No registry is needed to start."""
    assert [name for name in sorted(SERVICES) if SERVICES[name].get("profiles")] == ["registry"]


def test_all_data_is_in_named_volumes():
    """`docker compose down` loses nothing, `down --volumes` everything."""
    mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}

    assert set(COMPOSE["volumes"]) == mounted
