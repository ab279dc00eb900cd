"""The demo's input: what it is made of, and that the checker's own reading of it is right."""

from __future__ import annotations

import csv
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from meterline.demo.checker import read_input
from meterline.demo.scenario import client_of, clients_of, write_scenario
from meterline.demo.traces import read_requests
from meterline.errors import UserError

NOW = datetime(2026, 11, 24, 12, 30, 40, tzinfo=UTC)
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture(scope="module")
def sample():
    requests, _ = read_requests(None)
    return requests


@pytest.fixture(scope="module")
def scenario(sample, tmp_path_factory):
    return write_scenario(sample, "run", NOW, tmp_path_factory.mktemp("scenario"))


def test_traces_are_merged_by_time(tmp_path):
    """Two files, each in its own order, become one log."""
    (tmp_path / "azure_llm_2023_code.csv").write_text(HEADER + "2023-11-16 18:17:03.9799600,4808,10\n")
    (tmp_path / "azure_llm_2023_conv.csv").write_text(
        HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:18:00.0000000,1,2\n"
    )

    requests, _ = read_requests(tmp_path)

    assert [(r.service, r.number) for r in requests] == [("conv", 1), ("code", 1), ("conv", 2)]
    assert (requests[1].prompt_tokens, requests[1].generated_tokens) == (4808, 10)


@pytest.mark.parametrize(
    "text", ["", "a,b,c\n1,2,3\n", HEADER + "yesterday,1,2\n", HEADER + "2023-11-16,x,2\n"]
)
def test_what_is_no_trace_is_refused_with_its_name(tmp_path, text):
    """No traceback, and no half of an input."""
    for service in ("code", "conv"):
        (tmp_path / f"azure_llm_2023_{service}.csv").write_text(text)

    with pytest.raises(UserError, match=r"azure_llm_2023_code\.csv"):
        read_requests(tmp_path)


def test_the_sample_is_the_same_every_time(sample):
    """A failure on it can be repeated."""
    assert sample == read_requests(None)[0]


def test_every_request_belongs_to_a_client_of_its_run(sample):
    """The row number decides, so that anybody can tell whose a request was."""
    assert {client_of(request, "run") for request in sample} == set(clients_of("run"))


def test_the_last_minute_of_usage_ended_just_now(scenario):
    """Every window can close at once; no event is ahead of the broker's clock."""
    assert timedelta(0) < NOW - scenario.ended_at < timedelta(minutes=1)
    assert scenario.ended_at.replace(microsecond=0) == datetime(2026, 11, 24, 12, 29, 59, tzinfo=UTC)


def test_the_input_holds_every_kind_of_trouble(scenario):
    """Equal rows, the same task with another time, and tasks that come long after their time."""
    with scenario.usage_file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    whole = Counter(tuple(row.values()) for row in rows)
    charges = Counter((row["client_id"], row["correlation_id"], row["sku"]) for row in rows)
    newest, late = "", 0
    for row in rows:
        late += row["occurred_at"] < newest and (
            datetime.fromisoformat(newest) - datetime.fromisoformat(row["occurred_at"]) > timedelta(minutes=5)
        )
        newest = max(newest, row["occurred_at"])

    resent = whole.total() - len(whole)
    retried = charges.total() - len(charges) - resent
    assert min(resent, retried, late) > 10


def test_the_checker_counts_each_charge_once(scenario, sample):
    """Two charges a request, whatever is said twice; the poison is apart."""
    expected = read_input([scenario.usage_file], scenario.poison_file, scenario.grants_file)

    assert sum(expected.events.values()) == 2 * len(sample)
    assert expected.records - sum(expected.events.values()) - expected.dead.total() > 20
    assert set(expected.dead.values()) == {1}
    assert expected.dead.total() == 8


def test_everybody_but_the_trial_has_credits_to_spare(scenario):
    """Usage that nobody reserved is charged by the log: it must not look like debt."""
    expected = read_input([scenario.usage_file], scenario.poison_file, scenario.grants_file)

    assert set(scenario.clients) == expected.granted_micro.keys()
    assert all(expected.granted_micro[client] > micro for client, micro in expected.credits_micro.items())
    assert expected.granted_micro[scenario.trial] == 100_000_000
