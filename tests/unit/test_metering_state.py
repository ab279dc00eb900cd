"""The bytes of metering's state, and the checks that stop a partition whose stories differ."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.window_lengths import LENGTHS_MAX, LengthChange, WindowLengths
from meterline.domain.windows import SkuTotal
from meterline.errors import PartitionHalted
from meterline.metering import state
from meterline.metering.checks import (
    DIFFERENCES_SHOWN_MAX,
    check_log,
    check_windows,
    first_meta,
    lengths_asked_for,
)
from meterline.metering.state import FORMAT_VERSION, RULE_VERSION, Counters, Meta
from meterline.settings import MeteringSettings
from meterline.streaming.owner import LogRange

int64 = st.integers(-(2**63), 2**63 - 1)
partitions = st.integers(0, 2**16 - 1)
ids = st.text(max_size=50)
LOG = LogRange("cluster", "usage.events", "topic", 3, 100, 200)
KEPT = {(0, "acme"): {"gpu": SkuTotal(1, 5, 1, 7)}}
IN_LEDGER = (0, "acme", "gpu", 1, 5, 1, 7)
META = Meta("cluster", "topic", 149, 5, 6, WindowLengths.of(3_600_000), Counters(100, 40, 5, 3, 2))
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


changes = st.lists(st.builds(LengthChange, int64, int64, int64), min_size=1, max_size=3)
lengths = st.builds(WindowLengths, changes.map(tuple))
older_rules = st.lists(st.tuples(int64, int64), max_size=2).map(tuple)


@given(
    st.builds(
        Meta,
        *(ids, ids, int64, int64, int64, lengths),
        counters=st.builds(Counters, int64, int64, int64),
        older_rules=older_rules,
    )
)
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
        ({"lengths": WindowLengths.of(60_000)}, "METERLINE_METERING__WINDOW_LENGTH_MS=60000; or, if"),
    ],
)
def test_a_state_of_another_log_halts_with_the_exact_range(change, text):
    """The person who repairs it needs the first and the last offset."""
    with pytest.raises(PartitionHalted, match=rf"^usage\.events-3: .*{text}"):
        check_log(replace(META, **change), LOG, OPTIONS)


def test_windows_that_equal_the_ledger_pass():
    """Also where the ledger knows windows that memory has forgotten."""
    forgotten = [(0, "other", "gpu", 1, 1, 0, 0), (0, "acme", "cpu", 1, 1, 0, 0)]

    check_windows(KEPT, [*forgotten, IN_LEDGER], META, 3)


@pytest.mark.parametrize("ledger", [None, (2, 5, 1, 7), (1, 4, 1, 7), (1, 5, 2, 7), (1, 5, 1, 8)])
def test_a_window_that_differs_halts_with_both_amounts(ledger):
    """In whichever of the four. Named: client, SKU, window, and up to which offset."""
    rows = [] if ledger is None else [(0, "acme", "gpu", *ledger)]
    with pytest.raises(
        PartitionHalted, match=r"partition 3: up to offset 149 .* 1 of 1 sums: client acme, SKU gpu, window 0"
    ) as halted:
        check_windows(KEPT, rows, META, 3)

    assert str(KEPT[0, "acme"]["gpu"]) in str(halted.value)
    assert f"ledger {ledger and SkuTotal(*ledger)}" in str(halted.value)


def test_a_message_about_many_windows_stays_readable():
    """The number of all, the first few by name."""
    kept = {(start, "acme"): {"gpu": SkuTotal(1, 5)} for start in range(50)}

    with pytest.raises(PartitionHalted, match="50 of 50 sums") as halted:
        check_windows(kept, [], META, 3)

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
        check_windows(KEPT, [], META, 3)

    assert "at offsets 110..149" in str(lost.value)
    assert "meterline repair state 3 --reason" in str(lost.value)
    for what in ("ledger", "state"):
        assert f"meterline repair {what} 3 --reason" in str(different.value)


# -- other versions

FORMAT_2 = (
    b'{"cluster_id":"cluster","topic_id":"topic","applied_offset":149,"appended_at":5,"watermark":6,'
    b'"window_length_ms":3600000,"counters":{"first_offset":100,"accepted":40,"duplicates":5,'
    b'"dead_letters":3,"skipped":2,"unknown":0},"published_until":140,"accounted_until":4,'
    b'"format":2,"rules":1}'
)
"""As the version before wrote it."""


def test_a_state_of_the_format_before_is_read_on():
    """Its one length of windows is the first of those there may be."""
    meta = Meta.from_bytes(FORMAT_2)

    assert meta.format == 2
    assert meta.brought_up_to_date(LOG.end_offset) == replace(META, published_until=140, accounted_until=4)


@pytest.mark.parametrize("newer", [{"format": FORMAT_VERSION + 1}, {"rules": RULE_VERSION + 1}])
def test_a_newer_state_is_refused_whatever_else_is_in_it(newer):
    """Nothing of it can be known, but that the newer version must run here."""
    fields = json.loads(META.to_bytes()) | newer | {"what_is_this": [1]}
    del fields["lengths"]

    with pytest.raises(PartitionHalted, match="Run the newer version here, too") as halted:
        Meta.from_bytes(json.dumps(fields).encode())

    assert all(f"{name} {version}" in str(halted.value) for name, version in newer.items())


def test_new_rules_hold_for_what_is_appended_after_them(monkeypatch):
    """What was in the log may have been decided by the old ones, in a flush that died before its commit."""
    before = replace(META, applied_offset=120, older_rules=((115, 0),))
    monkeypatch.setattr(state, "RULE_VERSION", RULE_VERSION + 1)

    meta = Meta.from_bytes(before.brought_up_to_date(200).to_bytes())

    assert meta.older_rules == ((199, RULE_VERSION),), "what is applied needs no rules any more"
    assert [meta.rules_at(offset) for offset in (121, 199, 200)] == [RULE_VERSION] * 2 + [RULE_VERSION + 1]
    assert meta.brought_up_to_date(300) == meta


# -- the length of windows

HOUR, DAY = 3_600_000, 86_400_000
AHEAD = 5 * 60_000


def asking(length_ms, since=0):
    return MeteringSettings(
        window_length_ms=length_ms, window_length_since=datetime.fromtimestamp(since / 1000, UTC)
    )


def at(applied_until, *changes):
    """A state that has seen records up to an append time, with windows of an hour first."""
    first = LengthChange(0, 0, HOUR)
    return replace(META, appended_at=applied_until, lengths=WindowLengths((first, *changes)))


@pytest.mark.parametrize(
    ("applied_until", "length_ms", "since", "starts"),
    [
        (0, HOUR // 2, 10 * HOUR, 10 * HOUR),
        (0, HOUR // 2, 10 * HOUR + 1, 11 * HOUR),
        (0, 45 * 60_000, 10 * HOUR, 12 * HOUR),
        (20 * HOUR - AHEAD - 1, 2 * HOUR, 10 * HOUR, 20 * HOUR),
        (20 * HOUR - AHEAD, 2 * HOUR, 10 * HOUR, 22 * HOUR),
    ],
    ids=[
        "at its time",
        "at the next edge",
        "at a shared edge",
        "no event can be there",
        "one could be there",
    ],
)
def test_a_change_begins_at_a_shared_edge_where_no_event_is_yet(applied_until, length_ms, since, starts):
    """Behind it every window has the new length, before it none."""
    lengths = lengths_asked_for(at(applied_until), LOG, asking(length_ms, since))

    assert lengths.changes[1:] == (LengthChange(since, starts, length_ms),)
    assert (lengths.end_of(starts - HOUR), lengths.end_of(starts)) == (starts, starts + length_ms)


CHANGED = LengthChange(10 * HOUR, 10 * HOUR, DAY // 48)


@pytest.mark.parametrize("settings", [asking(HOUR), asking(2 * HOUR, 9 * HOUR), asking(CHANGED.length_ms)])
@pytest.mark.parametrize("applied_until", [0, 90 * DAY])
def test_an_older_setting_goes_on_with_the_newer_length(settings, applied_until):
    """A worker that was not restarted yet, before and after the change: it changes nothing back."""
    meta = at(applied_until, CHANGED)

    assert meta.lengths == lengths_asked_for(meta, LOG, settings)


def test_a_length_is_changed_back_by_a_later_setting():
    """Also before the first change has begun: then its windows never are."""
    meta = at(0, LengthChange(HOUR, 48 * HOUR, 2 * HOUR))

    lengths = lengths_asked_for(meta, LOG, asking(HOUR, 2 * HOUR))

    assert lengths.newest == LengthChange(2 * HOUR, 48 * HOUR, HOUR)
    assert {lengths.at(time) for time in range(0, 100 * HOUR, HOUR // 2)} == {HOUR}


@pytest.mark.parametrize(
    ("meta", "settings", "text"),
    [
        (at(0), asking(HOUR // 2), f"WINDOW_LENGTH_MS={HOUR}; .*WINDOW_LENGTH_SINCE"),
        (at(0, CHANGED), asking(HOUR, 10 * HOUR), f"WINDOW_LENGTH_MS={CHANGED.length_ms}; "),
        (at(0), asking(HOUR + 1, HOUR), "begin together only every .* Choose one that divides"),
        (at(0, *[CHANGED] * (LENGTHS_MAX - 1)), asking(HOUR, DAY), "changed 19 times, and that is the most"),
    ],
    ids=["no time", "two at one time", "no shared edge", "too often"],
)
def test_a_length_that_can_not_be_halts_and_says_why(meta, settings, text):
    """Nothing is counted under it."""
    with pytest.raises(PartitionHalted, match=rf"^usage\.events-3: .*{text}"):
        check_log(meta, LOG, settings)
