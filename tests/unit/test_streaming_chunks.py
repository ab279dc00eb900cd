"""Chunks: what Faust is handed for a fetch."""

from __future__ import annotations

import gc
import weakref

import pytest
from tests import kafka_batches

from meterline.streaming.chunks import split_into_chunks


@pytest.fixture
def without_collector():
    """Whatever is in a cycle stays."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_a_chunk_goes_with_the_last_who_holds_it():
    """Its batches are views of the broker's answer, megabytes: cycles are looked for too seldom for that."""
    answer = kafka_batches.batch(0, [(offset, 1, b"k", b"v", []) for offset in range(10)])
    chunks = list(split_into_chunks(0, kafka_batches.batches_of(answer)))
    records = weakref.ref(chunks[0].value[1])
    assert records() is not None

    del chunks

    assert records() is None
