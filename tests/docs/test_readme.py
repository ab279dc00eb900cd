"""The pages are true: the README can be followed, and what they name is there."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
import typer
from prometheus_client import Metric
from pydantic import SecretStr
from tests.docs.pages import ROOT, Block, all_pages, blocks_of, code_of, links_of
from tests.stacks import settings_of

from meterline import metrics
from meterline.cli.billing import REMEDIES
from meterline.cli.main import COMMANDS
from meterline.ledger.client import connect
from meterline.local.ports import HOST, Ports, free_ports
from meterline.local.stack import Stack
from meterline.settings import Settings

README = Path("README.md")
OPERATIONS = Path("docs/operations.md")

EXEMPT = {
    "make demo": "runs the whole pipeline for minutes; tests/integration/test_demo.py runs the demo",
    "make test": "is what runs this test",
}
"""Commands that are not executed here; that they exist is checked instead."""

WORKER = re.compile(r"^((?:\w+=\S+ )*)meterline worker (\w+)$")
"""A command that doesn't end: started in the background, as the reader does in another terminal."""

ANSWER_S_MAX = 90.0
COMMAND_S_MAX = 120.0

OTHER_VARIABLES = {
    "METERLINE_STATE_DIR": "app/meterline/cli/stack.py",
    "METERLINE_TRACES": "app/meterline/cli/demo.py",
    "METERLINE_TEST_STACK": "tests/stacks.py",
    "METERLINE_PORT_BILLING_WEB": "docker-compose.yml",
    "METERLINE_PORT_REGISTRY": "docker-compose.yml",
}
"""Variables that are no settings, and the file that reads each."""


class Reader:
    """Somebody who follows the README on a machine of their own: a folder, free ports, no settings."""

    def __init__(self, folder: Path, workers: ExitStack) -> None:
        self.folder = folder
        self.ports = Ports.free()
        self.stack = Stack(folder / "stack", self.ports)
        self.printed: dict[str, str] = {}
        self.rows: list[list[tuple]] = []
        self.workers = workers
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("METERLINE_")}
        ports = {f"METERLINE_PORT_{name.upper()}": str(getattr(self.ports, name)) for name in Ports.__slots__}
        self.environment = {
            **inherited,
            **ports,
            **self.stack.environment(),
            "METERLINE_STATE_DIR": str(self.stack.state_dir),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}",
            "COLUMNS": "200",
        }

    def follow(self, block: Block) -> None:
        """Do what one block says."""
        if "meterline receipt" in block.text:
            self._wait_for_stripe()
        if "meterline down" in block.text:
            self.workers.close()
        match block.language:
            case "sh":
                self._run_shell(block.text)
            case "python":
                self._run([sys.executable, "-c", block.text])
            case "sql":
                self.rows.append(self._query(block.text))

    def _run_shell(self, text: str) -> None:
        left = []
        for line in text.splitlines():
            if worker := WORKER.match(line):
                self._start_worker(worker[2], dict(part.split("=") for part in shlex.split(worker[1])))
            elif line not in EXEMPT:
                left.append(line)
        # The page names the default ports; this reader's are moved.
        script = "\n".join(left).replace(f"{HOST}:{Ports().stripe}", f"{HOST}:{self.ports.stripe}")
        if script.strip():
            self.printed[script] = self._run(["bash", "-euo", "pipefail", "-c", script])

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _start_worker(self, kind: str, settings: dict[str, str]) -> None:
        (port,) = free_ports(1)
        log_file = self.folder / f"{kind}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                ["meterline", "worker", kind],
                env=self.environment | settings | {"METERLINE_WORKER__WEB_PORT": str(port)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                executable=Path(sys.executable).with_name("meterline"),
            )
        self.workers.callback(_stop, process)
        deadline = time.monotonic() + ANSWER_S_MAX
        while not _is_ready(port):
            assert process.poll() is None, log_file.read_text()
            assert time.monotonic() < deadline, f"{kind} is not ready: {log_file.read_text()}"
            time.sleep(0.1)

    def _wait_for_stripe(self) -> None:
        """The page lets the reader take a breath here; the window of task-17 must have reached Stripe."""
        deadline = time.monotonic() + ANSWER_S_MAX
        while "accepted" not in (seen := self._run(["meterline", "billing", "status", "--json"])):
            assert time.monotonic() < deadline, f"nothing reached Stripe: {seen}"
            time.sleep(0.5)

    def _query(self, sql: str) -> list[tuple]:
        client = connect(settings_of(self.stack.environment()).clickhouse)
        try:
            return client.execute(sql)
        finally:
            client.disconnect()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/healthz/ready", timeout=2) as answer:
            return json.load(answer)["partitions"] != []
    except OSError:
        return False


@pytest.mark.stack
def test_the_readme_can_be_followed(tmp_path):
    """From top to bottom, on a machine that has nothing: each block does what the text says it does."""
    with ExitStack() as stack, ExitStack() as workers:
        reader = Reader(tmp_path, workers)
        stack.callback(reader.stack.down, wipe=True)
        for block in blocks_of(README):
            reader.follow(block)

    receipt = next(text for script, text in reader.printed.items() if "meterline receipt" in script)
    assert re.search(r"gpu-second +17\.25 +task-17 ", receipt)
    assert "usage record of 17: accepted" in receipt
    assert reader.rows == [
        [("acme", "gpu-second", Decimal("20.25"), 2), ("acme", "prompt-token", Decimal("0.0125"), 1)]
    ]
    assert not reader.stack.state_dir.exists(), "`meterline down --wipe` leaves nothing"


def test_only_known_languages_are_on_the_readme():
    """A block in a language that nobody executes would be a promise that nobody keeps."""
    assert {block.language for block in blocks_of(README)} <= {"sh", "python", "sql", "mermaid"}


def test_what_is_exempt_is_on_the_page():
    """An exemption that no block needs any more is removed."""
    lines = {line for block in blocks_of(README) for line in block.text.splitlines()}

    assert EXEMPT.keys() <= lines


def test_every_make_target_exists():
    """`make X` on a page is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (str(page), target)
        for page in all_pages()
        for code in code_of(page)
        for target in re.findall(r"^make ([a-z-]+)", code)
    }

    assert {target for _, target in named} >= {"demo", "test", "bench"}
    assert [one for one in sorted(named) if one[1] not in targets] == []


def test_every_command_exists_with_its_options():
    """`meterline X Y --option` on a page is a command, and takes the option."""
    wrong = []
    for page in all_pages():
        for code in code_of(page):
            for text in re.findall(r"(?:^|[ (])(meterline [a-z].*)$", code):
                wrong += [(str(page), text, what) for what in _unknown(text.split(" #")[0])]

    assert wrong == []


def _unknown(text: str) -> list[str]:
    words = [word.strip(",;.)\"'") for word in re.split(r"[;|&]| and ", text)[0].split()][1:]
    if words[0] not in COMMANDS:
        return [words[0]]
    module, attribute = COMMANDS[words[0]][0].split(":")
    command = getattr(importlib.import_module(f"meterline.cli.{module}"), attribute)
    if not isinstance(command, typer.Typer):
        single = typer.Typer(add_completion=False)
        single.command(words[0])(command)
        command = single
    group = typer.main.get_command(command)
    if (subcommands := getattr(group, "commands", None)) is not None:
        # A page may speak of the whole group: "meterline worker".
        plain = [word for word in words[1:] if re.fullmatch(r"[a-z]+", word)]
        if not plain:
            return []
        if plain[0] not in subcommands:
            return [plain[0]]
        group = subcommands[plain[0]]
    options = {
        option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in options]


@pytest.mark.parametrize("page", all_pages(), ids=str)
def test_every_link_leads_somewhere(page):
    """A link to a file of the project is a file of the project."""
    missing = [link for link in links_of(page) if not (ROOT / page.parent / link).exists()]

    assert missing == []


def _settings() -> dict[str, str]:
    """Every setting's variable and default, in the words of the table."""
    found = {}
    for section, model in Settings():
        for name, value in model:
            default = value.get_secret_value() if isinstance(value, SecretStr) else value
            if isinstance(default, datetime):
                default = default.isoformat().replace("+00:00", "Z")
            if default is None:
                default = ""
            word = str(default).lower() if isinstance(default, bool) else str(default)
            found[f"METERLINE_{section}__{name}".upper()] = f"`{word}`" if word else "empty"
    return found


@pytest.fixture
def defaults(monkeypatch):
    """All settings with their defaults, whatever this process's environment says."""
    for name in [name for name in os.environ if name.startswith("METERLINE_")]:
        monkeypatch.delenv(name)
    return _settings()


def test_every_variable_is_read_by_something(defaults):
    """A METERLINE_ variable on a page is a setting, a port, or read by the file that is named above."""
    ports = {f"METERLINE_PORT_{name.upper()}" for name in Ports.__slots__}
    named = {
        variable
        for page in all_pages()
        for variable in re.findall(r"METERLINE_[A-Z_]*[A-Z](?![A-Z_])", (ROOT / page).read_text())
    }

    assert named - defaults.keys() - ports - OTHER_VARIABLES.keys() == set()
    assert [name for name, file in OTHER_VARIABLES.items() if name not in (ROOT / file).read_text()] == []


def test_the_table_of_settings_is_complete(defaults):
    """Every setting stands in the runbook, with its default."""
    rows = re.findall(
        r"^\| `(METERLINE_\w+__\w+)` \| (.+?) \|", (ROOT / OPERATIONS).read_text(), re.MULTILINE
    )

    assert defaults == dict(rows)


def test_the_catalogue_of_metrics_is_complete():
    """Every metric stands in the runbook, by the name a scrape shows, with its labels."""
    expected = {}
    for name in metrics.__all__:
        metric = getattr(metrics, name)
        (described,) = metric.describe()
        assert isinstance(described, Metric)
        suffix = "_total" if described.type == "counter" else ""
        expected[described.name + suffix] = list(metric._labelnames)
    rows = re.findall(r"^\| `(meterline_\w+)` \| (.*?) \|", (ROOT / OPERATIONS).read_text(), re.MULTILINE)

    assert expected == {name: re.findall(r"`(\w+)`", labels) for name, labels in rows}


def test_every_reason_to_hold_has_its_remedy():
    """Each reason `meterline billing status` explains has a row in the runbook."""
    section = (ROOT / OPERATIONS).read_text().split("## Held windows and usage records")[1].split("\n## ")[0]

    assert set(REMEDIES) == set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
