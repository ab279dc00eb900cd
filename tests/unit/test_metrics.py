"""The catalogue of metrics and the code that sets them agree (with the page: tests/docs/test_readme.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram

from meterline import metrics

ROOT = Path(__file__).parents[2]
CODE = "\n".join(
    path.read_text() for path in (ROOT / "app" / "meterline").rglob("*.py") if path.name != "metrics.py"
)
CATALOGUE = {name: getattr(metrics, name) for name in metrics.__all__}
SETS = {Counter: r"inc\(", Gauge: r"set\(|set_function\(|inc\(", Histogram: r"observe\(|time\("}


def test_the_catalogue_is_complete():
    """What is exported is all there is."""
    made = {name for name, value in vars(metrics).items() if isinstance(value, tuple(SETS))}

    assert made == set(metrics.__all__)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_metric_is_set_somewhere(name):
    """One that always says nothing looks like health."""
    sets = r"labels\(" if CATALOGUE[name]._labelnames else SETS[type(CATALOGUE[name])]

    assert re.search(rf"\b{name}\.({sets})", CODE)
