"""Billing's state is its changelog: whatever happened, a restart reads back exactly what memory held."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meterline.billing.state import BillingState, Meta, Waiting
from meterline.domain.account_books import MeterTerms
from meterline.domain.accounts import Account, AccountKey, Day
from meterline.domain.billing import Known
from meterline.domain.usage_records import RecordState, UsageRecord
from meterline.errors import PartitionHalted

PARTITION = 258
numbers = st.integers(-(2**63), 2**63 - 1)
texts = st.text(max_size=12)
windows = st.sampled_from([f"{n:032x}" for n in (0, 10, 2**128 - 1)])
names = st.sampled_from(["mlur_a", "mlur_b", "mlur_ü"])
accounts = st.builds(AccountKey, texts, texts, numbers, numbers, texts)
days = st.integers(0, 2**32 - 1)
KEY_OF = {  # a record never changes its account
    "mlur_a": AccountKey("acme", "credits", 0, 1, "cus_1"),
    "mlur_b": AccountKey("acme", "credits", 0, 1, "cus_1"),
    "mlur_ü": AccountKey("ü", "credits", 1, 2, "cus_2"),
}
values = st.builds(
    UsageRecord,
    identifier=names,
    client_id=texts,
    meter=texts,
    value=numbers,
    state=st.sampled_from(RecordState),
    first_attempt_at=st.none() | numbers,
    attempt_key=st.integers(0, 9),
    held_reason=texts,
    **dict.fromkeys(("window_id", "source_topic_id", "event_name", "customer"), texts),
    **dict.fromkeys(
        ("map_version", "period_start", "period_end", "window_start", "window_end", "source_partition"),
        numbers,
    ),
    **dict.fromkeys(("cutoff_offset", "event_timestamp", "reissue"), numbers),
)


def in_its_account(record):
    key = KEY_OF[record.identifier]
    return replace(
        record,
        client_id=key.client_id,
        meter=key.meter,
        period_start=key.period_start,
        period_end=key.period_end,
        customer=key.customer,
    )


records = values.map(in_its_account)
changes = st.one_of(
    st.tuples(
        st.just("set_window"),
        windows,
        st.builds(Known, numbers, texts, st.dictionaries(texts, numbers, max_size=3)),
    ),
    st.tuples(
        st.just("set_account"),
        accounts,
        st.builds(Account, numbers, numbers, numbers, numbers, numbers, st.booleans(), texts),
    ),
    st.tuples(
        st.just("set_day"),
        accounts,
        days,
        st.builds(Day, numbers, numbers, numbers, st.booleans(), st.booleans(), st.booleans()),
    ),
    st.tuples(st.just("drop_days"), accounts),
    st.tuples(st.just("use_meter"), texts, st.builds(MeterTerms, texts, numbers)),
    st.tuples(st.just("set_meter_id"), texts, texts),
    st.tuples(st.just("set_order"), texts, numbers),
    st.tuples(st.just("set_record"), records),
    st.tuples(
        st.just("set_waiting"), windows, st.builds(Waiting, st.binary(max_size=40), texts, numbers, numbers)
    ),
    st.tuples(st.just("add_row"), st.tuples(texts, numbers, texts)),
    st.tuples(st.just("drop_record"), names),
    st.tuples(st.just("drop_waiting"), windows),
    st.tuples(st.just("drop_rows"), st.lists(st.integers(0, 5), unique=True)),
    st.tuples(st.just("set_meta"), st.integers(-1, 2**40)),
    st.tuples(st.just("commit")),
)


def fresh():
    return BillingState(PARTITION, Meta("topic", "local", 1, "digest"))


def commit(state, changelog):
    for key, value in state.take_changes():
        if value is None:
            changelog.pop(key, None)
        else:
            changelog[key] = value


def apply(state, change, changelog):
    what, *arguments = change
    if what == "commit":
        commit(state, changelog)
    elif what == "set_meta":
        state.set_meta(Meta("topic", "local", 1, "digest", arguments[0], state.meta.next_seq))
    elif what == "drop_rows":
        state.drop_rows([seq for seq in arguments[0] if seq in state.outbox])
    elif what in {"drop_record", "drop_waiting"}:
        if arguments[0] in (state.records if what == "drop_record" else state.waiting):
            getattr(state, what)(*arguments)
    else:
        getattr(state, what)(*arguments)


@given(st.lists(changes, max_size=25))
def test_a_restart_reads_back_what_memory_held(plan):
    """Any changes, committed at any moments: nothing is lost, nothing dropped comes back."""
    state, changelog = fresh(), {}
    for change in plan:
        apply(state, change, changelog)
    state.set_meta(state.meta)
    commit(state, changelog)

    assert state == BillingState.decode(PARTITION, changelog)
    assert state.take_changes() == []


@given(st.lists(changes, min_size=1, max_size=25))
def test_every_commit_carries_meta_with_the_next_seq(plan):
    """Rows are numbered once: a restart never gives a seq a second time."""
    state = fresh()
    for change in plan:
        apply(state, change, {})

    changed = dict(state.take_changes())

    if changed:
        written = dict(changed)[b"M" + PARTITION.to_bytes(4, "big")]
        assert (
            state.meta == BillingState.decode(PARTITION, {b"M" + PARTITION.to_bytes(4, "big"): written}).meta
        )


@given(st.lists(changes, max_size=25))
def test_every_key_names_its_partition(plan):
    """One table holds all partitions: equal names of two must not meet."""
    state = fresh()
    for change in plan:
        apply(state, change, {})

    assert all(key[1:5] == PARTITION.to_bytes(4, "big") for key, _ in state.take_changes())


def test_no_changelog_is_no_state():
    """The partition was never owned."""
    assert BillingState.decode(PARTITION, {}) is None


def test_state_without_meta_or_of_another_version_or_kind_halts():
    """A guess here would bill again."""
    state, changelog = fresh(), {}
    state.set_meta(state.meta)
    state.add_row(("a",))
    commit(state, changelog)
    meta_key = b"M" + PARTITION.to_bytes(4, "big")

    with pytest.raises(PartitionHalted, match=f"partition {PARTITION} has 1 keys and no META"):
        BillingState.decode(PARTITION, {key: changelog[key] for key in changelog if key != meta_key})
    with pytest.raises(PartitionHalted, match="format 9; this version reads up to 3"):
        BillingState.decode(PARTITION, {meta_key: changelog[meta_key].replace(b",3,0]", b",9,0]")})
    with pytest.raises(PartitionHalted, match="unknown kind b'Z'"):
        BillingState.decode(PARTITION, changelog | {b"Z" + meta_key[1:]: b"[]"})
