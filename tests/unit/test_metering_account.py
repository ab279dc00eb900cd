"""The account of a partition's offsets: it adds up, or says by how much it doesn't and why."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from meterline.cli import lag
from meterline.cli.main import app
from meterline.domain.window_lengths import WindowLengths
from meterline.metering.account import account_of
from meterline.metering.state import Counters, Meta, meta_key
from meterline.streaming.owner import LogRange

LOG = LogRange("cluster", "usage.events", "topic", 0, 0, 120)
META = Meta(
    "cluster",
    "topic",
    applied_offset=109,
    appended_at=1_700_000_000_000,
    watermark=1_699_999_700_000,
    lengths=WindowLengths.of(1_000),
    counters=Counters(first_offset=10, accepted=90, duplicates=4, dead_letters=3, skipped=3),
)


def test_a_whole_account_says_so():
    """100 offsets from 10 to 109: 90 + 4 + 3 + 3."""
    account = account_of(META, LOG)

    assert (account.first, account.last, account.offsets, account.counted) == (10, 109, 100, 100)
    assert (account.lag, account.problem) == (10, "")


@pytest.mark.parametrize(
    ("counters", "text"),
    [
        ({"accepted": 89}, "99 of 100 offsets are counted: 1 too few"),
        ({"duplicates": 6}, "102 of 100 offsets are counted: 2 too many"),
        ({"first_offset": 0}, "100 of 110 offsets are counted: 10 too few"),
    ],
)
def test_counters_that_miss_an_offset_are_named(counters, text):
    """One record that vanished is one too few."""
    broken = replace(META, counters=replace(META.counters, **counters))

    assert account_of(broken, LOG).problem == f"usage.events-0: {text}"


@pytest.mark.parametrize(
    ("log", "text"),
    [
        ({"topic_id": "other"}, "the topic was re-created"),
        ({"end_offset": 100}, "offsets 100..109 were counted, but the log ends at 99"),
        ({"start_offset": 115}, "offsets 110..114 are gone from the log and were never counted"),
    ],
)
def test_a_whole_account_of_another_log_is_none(log, text):
    """The counters are right, the offsets are not theirs."""
    assert text in account_of(META, replace(LOG, **log)).problem


def test_a_partition_nobody_has_owned_is_all_lag():
    """Nothing is counted, and nothing is missing."""
    account = account_of(None, replace(LOG, start_offset=20))

    assert (account.offsets, account.counted, account.lag, account.problem) == (0, 0, 100, "")


# -- the command


@pytest.fixture
def kafka(monkeypatch):
    """Two partitions; the second has no state."""
    states = SimpleNamespace(metas={0: META})
    saved = lambda partition: (  # noqa: E731 - one line of a fake
        {meta_key(partition): states.metas[partition].to_bytes()} if partition in states.metas else {}
    )
    monkeypatch.setattr(lag, "topic_partition_counts", lambda *_: {"usage.events": 2})
    monkeypatch.setattr(lag, "read_changelog", lambda _kafka, _topic, partition: saved(partition))
    monkeypatch.setattr(
        lag,
        "read_log_ranges",
        lambda _kafka, _topic, partitions: {p: replace(LOG, partition=p) for p in partitions},
    )
    return states


def run(*arguments):
    return CliRunner().invoke(app, ["lag", *arguments])


@pytest.mark.usefixtures("kafka")
def test_the_account_of_a_healthy_log_ends_with_0():
    """The sums of all partitions stand below."""
    done = run("--account")

    assert done.exit_code == 0, done.output
    assert "10..109" in done.output
    assert "none" in done.output


def test_an_account_that_does_not_add_up_ends_with_1(kafka):
    """And names the partition; without --account the lag is shown all the same."""
    kafka.metas[1] = replace(META, counters=replace(META.counters, dead_letters=2))
    done = run("--account")

    assert done.exit_code == 1
    assert "usage.events-1: 99 of 100 offsets are counted: 1 too few" in done.output
    assert run().exit_code == 0


def test_programs_get_every_number(kafka):
    """One object a partition, and one word for all."""
    kafka.metas[1] = replace(META, applied_offset=110)
    done = run("--account", "--json")
    told = json.loads(done.stdout)

    assert (done.exit_code, told["adds_up"]) == (1, False)
    whole, broken = told["partitions"]
    assert whole == {
        "partition": 0,
        "first": 10,
        "last": 109,
        "offsets": 100,
        "counted": 100,
        "accepted": 90,
        "duplicates": 4,
        "dead_letters": 3,
        "control": 3,
        "unknown": 0,
        "lag": 10,
        "adds_up": True,
        "problem": "",
        "watermark": "2023-11-14T22:08:20Z",
        "appended_at": "2023-11-14T22:13:20Z",
    }
    assert (broken["adds_up"], broken["offsets"], broken["counted"]) == (False, 101, 100)
