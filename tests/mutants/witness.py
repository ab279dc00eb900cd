"""A pytest plugin that notes why a test went red: by which assertion, where, about what.

Loaded by the runner alone (`-p tests.mutants.witness --witness FILE`), inside the copy.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import hypothesis
import pytest

import meterline

WAITING = ("not within", "didn't end within", "Timeout")
"""How failures begin that only say that something took too long (`until`, `wait`, pytest-timeout)."""


def pytest_addoption(parser):
    parser.addoption("--witness", type=Path, required=True, help="file for one JSON line per red test")


def pytest_configure(config):
    imported = Path(meterline.__file__)
    if not imported.is_relative_to(config.rootpath):
        raise pytest.UsageError(f"meterline comes from {imported}, not from the copy {config.rootpath}")
    # The same examples each time; the first failing one says enough, and nothing is remembered elsewhere.
    hypothesis.settings.register_profile(
        "mutants",
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        suppress_health_check=(hypothesis.HealthCheck.too_slow,),
    )
    hypothesis.settings.load_profile("mutants")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.excinfo is not None:
        note = _note(item.config.rootpath, call.excinfo) | {"test": item.nodeid, "when": report.when}
        with item.config.getoption("witness").open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
    return report


def _note(root: Path, excinfo) -> dict:
    """Where it was raised, by the last line of a test or of a test's helper on the way there."""
    error = excinfo.value
    frames = list(excinfo.traceback)
    ours = [frame for frame in frames if Path(frame.path).is_relative_to(root / "tests")]
    message = str(error) or "".join(traceback.format_exception_only(error))
    by_assertion = isinstance(error, AssertionError) and ours and frames[-1] is ours[-1]
    refused = isinstance(error, pytest.fail.Exception)  # `pytest.raises`: nothing was raised
    return {
        "assertion": bool((by_assertion or refused) and not message.startswith(WAITING)),
        "error": type(error).__name__,
        "line": " ".join(str(ours[-1].statement).split()) if ours else "",
        "place": f"{Path(ours[-1].path).name}:{ours[-1].lineno + 1}" if ours else "",
        "message": message[:2_000],
    }
