"""The main job as a user starts it: traces, real processes, kill -9, and every credit accounted for.

With a tenth of the requests: what is proved happens between flushes, which come with time, not with usage.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from meterline.demo.run import choose_ports
from meterline.demo.traces import COLUMNS, SERVICES, read_requests
from meterline.local.ports import Ports, is_free

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

CHAOS_TIMEOUT_S = 280
INTERRUPTED = 130
ONE_IN = 10


@pytest.fixture
def home(tmp_path):
    """An environment whose state is the test's own; downloads stay in the user's cache."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("METERLINE_")}
    return mine | {"XDG_STATE_HOME": str(tmp_path)}


@pytest.fixture
def traces(tmp_path):
    """A folder of traces: one in ten requests of the sample."""
    folder = tmp_path / "traces"
    folder.mkdir()
    requests, _ = read_requests(None)
    for service in SERVICES:
        with (folder / f"azure_llm_2023_{service}.csv").open("w", newline="") as text:
            rows = csv.writer(text)
            rows.writerow(COLUMNS)
            rows.writerows(
                (f"{request.at:%Y-%m-%d %H:%M:%S.%f}0", request.prompt_tokens, request.generated_tokens)
                for request in requests[::ONE_IN]
                if request.service == service
            )
    return folder


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    """However a demo ends, no process of it stays."""
    yield
    left = [process for process in psutil.process_iter(["cmdline"]) if mentions(process, tmp_path)]
    for process in left:
        process.kill()
    assert left == []


def mentions(process, folder):
    return any(str(folder) in part for part in process.info["cmdline"] or [])


def demo(traces, *options):
    return [sys.executable, "-m", "meterline", "demo", "--traces", str(traces), *options]


def test_five_kills_change_no_total(home, traces):
    """Metering and billing die five times in mid-work, once between insert and commit: still conserved."""
    ran = subprocess.run(
        demo(traces, "--chaos"),
        env=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=CHAOS_TIMEOUT_S,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert sum(line.startswith("kill -9 ") for line in lines) == 5
    assert any("at rows.inserted" in line for line in lines)
    (replayed,) = [int(line.split()[-1]) for line in lines if line.startswith("Replayed offsets:")]
    assert replayed > 0
    last = re.fullmatch(
        r"conserved: yes \(events=(\d+) duplicates=(\d+) dead=(\d+) credits=[\d.]+ stripe_units=(\d+) "
        r"remainder=[\d.]+ held=[\d.]+\)",
        lines[-1],
    )
    assert last, lines[-1]
    assert all(int(count) > 0 for count in last.groups())
    trial = re.fullmatch(
        r"trial\.\S+ had 100 credits: (\d+) tasks done, (\d+) failed and cost nothing, (\d+) refused before "
        r"they began; [\d.]+ left, alerted 1 time\(s\)",
        lines[-2],
    )
    assert trial, lines[-2]
    assert all(int(count) > 0 for count in trial.groups())


def test_ctrl_c_stops_everything(home, traces):
    """Interrupted in the middle, it stops its workers and its stack and says so in one line."""
    started = subprocess.Popen(
        demo(traces), env=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    try:
        seen = ""
        while "Workers are ready" not in seen:
            line = started.stdout.readline()
            assert line, f"it ended too early: {seen}"
            seen += line
        started.send_signal(signal.SIGINT)
        rest, _ = started.communicate(timeout=60)
    finally:
        started.kill()

    assert started.returncode == INTERRUPTED, seen + rest
    assert "Interrupted: workers and stack are stopped." in rest
    assert "Traceback" not in rest


def test_ports_that_somebody_has_are_left_alone():
    """Where another stack has one of the usual ports, the demo takes free ones."""
    ports = Ports.free()
    with socket.create_server(("127.0.0.1", ports.kafka)):
        chosen = choose_ports(ports)

    assert chosen != ports
    assert is_free(chosen.kafka)
    assert choose_ports(chosen) == chosen
