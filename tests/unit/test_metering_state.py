"""The bytes of metering's state, and the checks that stop a partition whose stories differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.windows import SkuTotal
from meterline.errors import PartitionHalted
from meterline.metering import state
from meterline.metering.checks import DIFFERENCES_SHOWN_MAX, check_log, check_windows, first_meta
from meterline.metering.state import Counters, Meta
from meterline.settings import MeteringSettings
from meterline.streaming.owner import LogRange

int64 = st.integers(-(2**63), 2**63 - 1)
partitions = st.integers(0, 2**16 - 1)
ids = st.text(max_size=50)
LOG = LogRange("cluster", "usage.events", "topic", 3, 100, 200)
META = Meta("cluster", "topic", 149, 5, 6, 3_600_000, Counters(100, 40, 5, 3, 2))
OPTIONS = MeteringSettings()


@given(partitions, int64, ids, ids)
def test_keys_are_read_back(partition, start, client, sku):
    """Also where client and SKU hold anything at all."""
    assert state.parse_aggregate_key(state.aggregate_key(partition, start, client, sku)) == (
        start,
        client,
        sku,
    )
    assert state.parse_window_key(state.window_key(partition, start, client)) == (start, client)


keys = st.tuples(partitions, int64, ids, ids)


@given(keys, keys)
def test_equal_keys_are_equal_things(one, other):
    """Two clients whose names run together never share a sum."""
    assert (state.aggregate_key(*one) == state.aggregate_key(*other)) == (one == other)
    assert (state.window_key(*one[:3]) == state.window_key(*other[:3])) == (one[:3] == other[:3])


def test_a_client_and_its_sku_do_not_run_together():
    """The length of the client's name stands before it."""
    assert state.aggregate_key(0, 0, "ab", "c") != state.aggregate_key(0, 0, "a", "bc")


@given(int64, int64, int64, int64)
def test_values_are_read_back(count, paid, free_count, free):
    """Every int64, negative ones too."""
    total = SkuTotal(count, paid, free_count, free)

    assert total == state.parse_aggregate_value(state.aggregate_value(total))
    assert (count, paid) == state.parse_published_value(state.published_value(count, paid))


@given(st.builds(Meta, ids, ids, int64, int64, int64, int64, st.builds(Counters, int64, int64, int64)))
def test_meta_is_read_back(meta):
    """What a restart goes on from."""
    assert meta == Meta.from_bytes(meta.to_bytes())


def test_a_partition_nobody_owned_begins_at_its_oldest_record():
    """The first offset is where the counters begin to add up."""
    meta = first_meta(LOG, None, OPTIONS)

    assert (meta.applied_offset, meta.counters.first_offset, meta.topic_id) == (99, 100, "topic")
    check_log(meta, LOG, OPTIONS)


def test_rows_without_a_state_are_a_lost_changelog():
    """Counting again could bill twice."""
    with pytest.raises(
        PartitionHalted, match=r"^usage\.events-3: the ledger has 7 events at offsets 101\.\.150"
    ):
        first_meta(LOG, (7, 101, 150), OPTIONS)


@pytest.mark.parametrize("applied", [99, 150, 199])
def test_a_state_inside_the_log_goes_on(applied):
    """From the oldest record to the end, both included."""
    check_log(replace(META, applied_offset=applied), LOG, OPTIONS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"topic_id": "old"},
            r"re-created: the state is of topic id old up to offset 149, .*topic with offsets 100\.\.199",
        ),
        ({"applied_offset": 98}, r"offsets 99\.\.99 are gone from the log"),
        ({"applied_offset": 49}, r"offsets 50\.\.99 are gone from the log"),
        ({"applied_offset": 200}, r"offsets 200\.\.200 were counted, but the log ends at 199"),
        ({"applied_offset": 250}, r"offsets 200\.\.250 were counted, but the log ends at 199"),
        ({"format": 3}, "written with format 3 and rules 1; this version has format 2"),
        ({"rules": 2}, "written with format 2 and rules 2"),
        ({"window_length_ms": 60_000}, "METERLINE_METERING__WINDOW_LENGTH_MS=60000"),
    ],
)
def test_a_state_of_another_log_halts_with_the_exact_range(change, text):
    """The person who repairs it needs the first and the last offset."""
    with pytest.raises(PartitionHalted, match=rf"^usage\.events-3: .*{text}"):
        check_log(replace(META, **change), LOG, OPTIONS)


def test_windows_that_equal_the_ledger_pass():
    """Also where the ledger knows windows that memory has forgotten."""
    kept = {(0, "acme", "gpu"): SkuTotal(1, 5)}

    check_windows(kept, {**kept, (0, "other", "gpu"): SkuTotal(1, 1)}, META, 3)


@pytest.mark.parametrize("ledger", [{}, {(0, "acme", "gpu"): SkuTotal(1, 4)}])
def test_a_window_that_differs_halts_with_both_amounts(ledger):
    """Named: client, SKU, window, and up to which offset."""
    with pytest.raises(
        PartitionHalted, match=r"partition 3: up to offset 149 .* 1 of 1 sums: client acme, SKU gpu, window 0"
    ) as halted:
        check_windows({(0, "acme", "gpu"): SkuTotal(1, 5)}, ledger, META, 3)

    assert "credits_micro=5" in str(halted.value)
    assert str(ledger.get((0, "acme", "gpu"))) in str(halted.value)


def test_a_message_about_many_windows_stays_readable():
    """The number of all, the first few by name."""
    kept = {(start, "acme", "gpu"): SkuTotal(1, 5) for start in range(50)}

    with pytest.raises(PartitionHalted, match="50 of 50 sums") as halted:
        check_windows(kept, {}, META, 3)

    assert str(halted.value).count("client acme") == DIFFERENCES_SHOWN_MAX


@given(ids, st.builds(SkuTotal, int64, int64, int64, int64), int64)
def test_a_total_is_read_back(client, sums, last_offset):
    """Client ids may hold anything."""
    assert client == state.parse_total_key(state.total_key(3, client))
    assert (sums, last_offset) == state.parse_total_value(state.total_value(sums, last_offset))


@pytest.mark.parametrize(
    ("change", "log", "command"),
    [
        ({"topic_id": "older"}, LOG, "meterline repair state 3 --reason"),
        ({"applied_offset": 80}, LOG, "meterline repair state 3 --accept-gap 81..99 --reason"),
        ({"applied_offset": 250}, LOG, "meterline repair log 3 --reason"),
    ],
    ids=["re-created", "gap", "truncated"],
)
def test_a_halt_at_the_log_names_the_command_that_repairs_it(change, log, command):
    """With the partition and, of a gap, exactly its offsets."""
    with pytest.raises(PartitionHalted) as halted:
        check_log(replace(META, **change), log, OPTIONS)

    assert command in str(halted.value)


def test_a_halt_at_the_ledger_names_the_command_that_repairs_it():
    """A lost changelog is rebuilt; of different sums either side may be the wrong one."""
    with pytest.raises(PartitionHalted) as lost:
        first_meta(LOG, (5, 110, 149), OPTIONS)
    with pytest.raises(PartitionHalted) as different:
        check_windows({(0, "acme", "gpu"): SkuTotal(1, 2)}, {}, META, 3)

    assert "at offsets 110..149" in str(lost.value)
    assert "meterline repair state 3 --reason" in str(lost.value)
    for what in ("ledger", "state"):
        assert f"meterline repair {what} 3 --reason" in str(different.value)
