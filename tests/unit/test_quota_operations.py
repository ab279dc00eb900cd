"""The library's own packing of operations is that of `scripts.packed`, and the fake reads it back."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from meterline.quota import Part, operations
from meterline.quota.scripts import packed

IDS = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable() or "\n" in text)
AMOUNTS = st.integers(0, 2**53 - 1)
PARTS = st.lists(
    st.builds(Part, st.sampled_from(["usage.events", "Ab_c-1"]), st.integers(0, 3), AMOUNTS, AMOUNTS),
    max_size=4,
)
TTLS = st.integers(1, 86_400_000)
OPERATIONS = st.one_of(
    st.builds(operations.reserve, IDS, AMOUNTS, TTLS),
    st.builds(operations.settle, IDS, PARTS, final=st.booleans()),
    st.builds(operations.void, IDS),
    st.builds(operations.renew, IDS, AMOUNTS, TTLS, st.integers(0, 2**53 - 1)),
    st.builds(
        operations.lease,
        IDS,
        st.integers(1, 1_000),
        AMOUNTS,
        PARTS,
        ttl_ms=TTLS,
        generation=st.integers(0, 9),
    ),
    st.just(operations.BALANCE),
)


@given(st.lists(OPERATIONS, max_size=6))
def test_both_ways_to_pack_operations_give_the_same(ops):
    sources, flat = operations.flattened(ops)
    expected_sources, expected_flat, refused = packed([operations.as_array(op) for op in ops])

    assert refused == {}
    assert sources.decode() == expected_sources
    assert json.loads(flat) == json.loads(expected_flat)
