"""An older state is read on: its accounts keep their credits and units, its open records their names."""

from __future__ import annotations

import json

import pytest

from meterline.billing.formats import bring_up_to_date
from meterline.billing.state import FORMAT_VERSION, BillingState
from meterline.domain.account_books import MeterTerms
from meterline.domain.accounts import Account, AccountKey
from meterline.errors import PartitionHalted

MICRO = 1_000_000
DAY = 86_400_000
METERS = {"credits": MeterTerms("c", MICRO)}


def key(kind, name=b""):
    return kind + (0).to_bytes(4, "big") + name


def former(*accounts):
    """The changelog as format 1 wrote it: accounts, and one record that was sent and not answered."""
    changelog = {key(b"M"): json.dumps(["topic", "local", 2, "digest", 41, 7, 1]).encode()}
    for number, account in enumerate(accounts):
        changelog[key(b"A", bytes([number]) * 16)] = json.dumps(account).encode()
    where = ["acme", "credits", 2, 0, 30 * DAY, "0a" * 16, 0, DAY, "topic", 0, 9, "c", "cus_1", 3]
    record = ["mlur_1", *where, 2 * DAY // 1000, "unknown", 5 * DAY, 1, ""]
    changelog[key(b"R", b"mlur_1")] = json.dumps(record).encode()
    return changelog


def read(changelog):
    state = BillingState.decode(0, changelog)
    bring_up_to_date(state, METERS, {"other": "cus_2"})
    for name, value in state.take_changes():
        if value is None:
            changelog.pop(name, None)
        else:
            changelog[name] = value
    return state


def test_accounts_of_several_map_versions_become_one():
    """Their credits and units add up; what landed has no days; the open record is not landed."""
    changelog = former(
        ["acme", "credits", 1, 0, 30 * DAY, 4_250_000, 4],
        ["acme", "credits", 2, 0, 30 * DAY, 6_500_000, 6],
        ["other", "credits", 2, 0, 30 * DAY, 2_000_000, 2],
    )

    state = read(changelog)

    acme = AccountKey("acme", "credits", 0, 30 * DAY, "cus_1")
    assert state.accounts == {
        acme: Account(credits_micro=10_750_000, units=10, undated=7),
        AccountKey("other", "credits", 0, 30 * DAY, "cus_2"): Account(2_000_000, 2, undated=2),
    }
    assert [record.value for record in state.open_records(acme)] == [3]
    assert state.days(acme)[2].attempted == 3
    assert (state.meta.format_version, state.meta.applied_offset) == (FORMAT_VERSION, 41)


def test_what_was_brought_up_to_date_is_read_back():
    """The next worker finds the newest format, and nothing of format 1."""
    changelog = former(["acme", "credits", 2, 0, 30 * DAY, 6_500_000, 6])
    state = read(changelog)

    assert BillingState.decode(0, changelog) == state


def test_format_2_stays_as_it_is_but_for_its_number():
    """Its days were counted when they were sent, and are not counted once more."""
    changelog = former(["acme", "credits", 2, 0, 30 * DAY, 6_500_000, 6])
    read(changelog)
    changelog[key(b"M")] = json.dumps(["topic", "local", 2, "digest", 41, 7, 2]).encode()
    before = BillingState.decode(0, changelog)

    state = read(changelog)

    assert (state.days_of, state.accounts) == (before.days_of, before.accounts)
    assert state.meta.format_version == FORMAT_VERSION


def test_units_that_the_meters_file_cannot_explain_halt():
    """Another unit under the same name would change what the credits are worth."""
    with pytest.raises(PartitionHalted, match="'acme' on meter 'credits' has 3 units"):
        read(former(["acme", "credits", 1, 0, 30 * DAY, 6_500_000, 3]))


def test_a_newer_state_is_refused_whatever_else_is_in_it():
    """META may have more fields, and there may be keys of other kinds: nothing of it can be known."""
    changelog = former(["acme", "credits", 2, 0, 30 * DAY, 6_500_000, 6])
    meta = ["topic", "local", 2, "digest", 41, 7, FORMAT_VERSION + 1, 0, "more", [1]]
    changelog |= {key(b"M"): json.dumps(meta).encode(), key(b"?"): b"what is this"}

    with pytest.raises(
        PartitionHalted, match=f"format {FORMAT_VERSION + 1}.*Run the newer version here, too"
    ):
        BillingState.decode(0, changelog)
