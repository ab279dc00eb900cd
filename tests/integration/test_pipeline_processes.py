"""A metering worker as its surroundings see it: Faust's own command, health pages, ports, SIGTERM."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from tests.pipeline_books import log_ends, metering_metas
from tests.stacks import own_stack
from tests.worker_processes import ALL, until

from meterline.local.ports import HOST, free_ports
from meterline.streaming.fatal import EXIT_FENCED_OR_UNKNOWN

pytestmark = [pytest.mark.stack, pytest.mark.timeout(200)]

TERM_S_MAX = 8.0
FORSAKEN = """
from faust.assignor.partition_assignor import PartitionAssignor
from meterline.cli.main import main
def assign(*_):
    raise AssertionError("planted")
PartitionAssignor.assign = assign
main()
"""
"""A worker whose part in its group ends in an unexpected error."""
FAUST = [str(Path(sys.executable).with_name("faust")), "-A", "meterline.metering.worker", "worker"]


stack = own_stack()
"""Its ClickHouse is stopped, and every record of its topics is ours."""


def all_applied(stack):
    """Whether every record of the log is accounted for by a committed state."""
    applied = {partition: meta["applied_offset"] + 1 for partition, meta in metering_metas(stack).items()}
    return applied == log_ends(stack, "usage.events")


def test_fausts_own_command_meters(stack, traffic, worker):
    """`faust -A meterline.metering.worker worker`: pages on the port of the environment, events count."""
    worker.start(command=FAUST)
    until(worker.is_ready, "ready")
    traffic.publish(200)
    until(lambda: all_applied(stack), "all records are applied")

    assert worker.get_json("/healthz/live")[1]["alive"] is True
    assert worker.get_json("/healthz/ready") == (200, {"ready": True, "partitions": ALL, "problems": []})
    status, metrics = worker.get("/metrics")
    assert (status, "meterline_commits_total" in metrics) == (200, True)
    assert worker.terminate() == 0


def test_fausts_own_option_names_the_port(worker):
    """`--web-port` wins over the environment, whose port stays free."""
    (other,) = free_ports(1)
    worker.start(command=[*FAUST, "--web-port", str(other)])
    named, worker.port = worker.port, other
    until(worker.is_ready, "ready on the port of the option")
    with socket.socket() as probe:
        refused = probe.connect_ex((HOST, named))

    assert refused != 0
    assert worker.terminate() == 0


def test_a_worker_whose_part_in_its_group_ended_does_not_stay(worker):
    """No partition would ever come to it again, and its pages would say that it lives."""
    worker.start(command=[sys.executable, "-c", FORSAKEN, "worker", "metering"])

    assert worker.wait() == EXIT_FENCED_OR_UNKNOWN
    assert "planted" in worker.log_file.read_text()


@pytest.mark.parametrize("command", [(), FAUST], ids=["meterline", "faust"])
def test_a_port_in_use_is_not_taken(worker, command):
    """The worker ends and says which port, instead of working where no health page answers."""
    with socket.create_server((HOST, worker.port)):
        worker.start(command=command)

        assert worker.wait() not in {0, -signal.SIGKILL}
    assert str(worker.port) in worker.log_file.read_text()


def test_sigterm_ends_a_worker_with_0(stack, traffic, worker):
    """In the middle of the work, within seconds; the next one goes on where it stood."""
    worker.start_ready()
    with traffic.flowing():
        began = time.monotonic()
        code = worker.terminate()
        took = time.monotonic() - began

    assert code == 0
    assert took < TERM_S_MAX
    worker.start_ready()
    until(lambda: all_applied(stack), "the next worker has applied all")
    assert worker.terminate() == 0


def test_sigterm_ends_a_worker_while_clickhouse_is_down(stack, traffic, worker):
    """It waits for a ledger that can't answer: alive, and it may still be told to go. Nothing is lost."""
    worker.start_ready()
    with stack.without_clickhouse():
        traffic.publish(200)
        # An insert that fails, or before it the question for the past of a window that a late event reopens.
        until(lambda: "ClickHouse does not answer" in worker.log_file.read_text(), "the ledger is missed")
        status, alive = worker.get_json("/healthz/live")
        began = time.monotonic()
        code = worker.terminate()
        took = time.monotonic() - began

    assert (status, alive["alive"], code) == (200, True, 0)
    assert took < TERM_S_MAX
    worker.start_ready()
    until(lambda: all_applied(stack), "the next worker has applied all")
