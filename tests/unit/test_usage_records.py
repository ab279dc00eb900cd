"""The names of a usage record: other programs and later versions must find the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meterline.domain.usage_records import IDENTIFIER_LENGTH_MAX, idempotency_key, usage_record_identifier

GOLDEN = Path(__file__).parents[2] / "schemas" / "golden" / "usage-record-identifier.json"
VECTORS = json.loads(GOLDEN.read_text("utf-8"))["vectors"]


@pytest.mark.parametrize("vector", VECTORS, ids=[v["output"][5:13] for v in VECTORS])
def test_an_identifier_is_what_the_golden_vector_says(vector):
    """The vectors were made by other code; the identifier is part of the contract with Stripe's memory."""
    assert vector["output"] == usage_record_identifier(**vector["input"])


def test_every_part_of_an_identifier_counts():
    """Two records that differ in one part never share a name: installation and reissue among them."""
    assert len(VECTORS) == len({vector["output"] for vector in VECTORS})


def test_names_stay_within_stripes_limits():
    """100 characters for an identifier, 255 for an idempotency key, whatever the ids are."""
    identifier = usage_record_identifier("i" * 64, "ü" * 100, "m" * 64, "f" * 32, 2**63 - 1, reissue=10**6)

    assert len(identifier) <= IDENTIFIER_LENGTH_MAX
    assert len(idempotency_key(identifier, 10**6)) <= 255


def test_an_idempotency_key_names_its_attempt():
    """After a stored 500 the next attempt needs another key for the same identifier."""
    assert idempotency_key("mlur_1", 0) != idempotency_key("mlur_1", 1)
