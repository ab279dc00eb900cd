"""The catalogue of metrics, the code that sets them and the page that explains them agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram

from meterline import metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
CODE = "\n".join(
    path.read_text() for path in (ROOT / "app" / "meterline").rglob("*.py") if path.name != "metrics.py"
)
CATALOGUE = {name: getattr(metrics, name) for name in metrics.__all__}
SETS = {Counter: r"inc\(", Gauge: r"set\(|set_function\(|inc\(", Histogram: r"observe\(|time\("}


def exposed_name(metric):
    (family,) = metric.describe()
    return family.name + ("_total" if isinstance(metric, Counter) else "")


def documented():
    """Name -> labels, from the table."""
    rows = re.findall(r"^\| `(meterline_\w+)` \| (.*?) \| .+ \|$", PAGE, re.MULTILINE)
    return {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def test_every_metric_is_explained_and_every_row_is_a_metric():
    """With the labels it has: a dashboard is written from the page."""
    assert documented() == {exposed_name(metric): tuple(metric._labelnames) for metric in CATALOGUE.values()}


def test_the_catalogue_is_complete():
    """What is exported is all there is."""
    made = {name for name, value in vars(metrics).items() if isinstance(value, tuple(SETS))}

    assert made == set(metrics.__all__)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_metric_is_set_somewhere(name):
    """One that always says nothing looks like health."""
    sets = SETS[type(CATALOGUE[name])]

    assert re.search(rf"\b{name}(\.labels\([^\n]*\))?\.({sets})", CODE)
