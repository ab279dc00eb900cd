"""`meterline quota check`: what a bucket is compared with, on statements that are fed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import progress_key, total_key
from meterline.contracts.topics import CREDIT_GRANTS, USAGE_TOTALS
from meterline.quota.check import differences
from meterline.quota.inspect import Bucket, Provisional, Reservation, Shard, Source
from meterline.quota.statements import Funds, LogStatements
from meterline.settings import KafkaSettings

SOURCE = Source("topic", 0)
MICRO = 1_000_000
FAR = 4_000_000_000_000
"""A time of the log later than every deadline, ms."""


class FakeLog:
    """Stands for the clients of Kafka: the records of two partitions, which grow."""

    def __init__(self):
        self.records = {(USAGE_TOTALS, 0): [], (CREDIT_GRANTS, 0): []}
        self.read = dict.fromkeys(self.records, 0)

    def list_offsets(self, asked, **_):
        return {place: FakeAnswer(len(self.records[place.topic, place.partition])) for place in asked}

    def consume(self, _limit, _timeout):
        found = []
        for place, records in self.records.items():
            found += records[self.read[place] :]
            self.read[place] = len(records)
        return found

    def append(self, topic, key, value):
        records = self.records[topic, 0]
        records.append(FakeMessage(topic, len(records), key, value))

    def grant(self, grant_id="g1", credits_micro=100 * MICRO, kind="prepaid", start=None, base=()):
        end = start + 1 if kind == "baseline" else None
        parts = [
            {"topic_id": "topic", "source_partition": 0, "cutoff_offset": 0, "credits_micro": micro}
            for micro in base
        ]
        record = {"grant_id": grant_id, "client_id": "acme", "kind": kind, "credits_micro": credits_micro}
        record |= {"period_start": start, "period_end": end, "base": parts}
        record |= {"granted_at": 1, "granted_by": "test", "reason": ""}
        self.append(CREDIT_GRANTS, b"acme", RecordCodec("credit-grant").encode(record))

    def total(self, cutoff, credits_micro, client="acme"):
        record = {"topic_id": "topic", "source_partition": 0, "client_id": client, "cutoff_offset": cutoff}
        record |= {"count": 1, "credits_micro": credits_micro, "free_count": 0, "free_credits_micro": 0}
        self.append(USAGE_TOTALS, total_key("topic", 0, client), RecordCodec("usage-total").encode(record))

    def progress(self, published, accounted=1):
        record = {"topic_id": "topic", "source_partition": 0}
        record |= {"accounted_until": accounted, "published_until": published}
        self.append(USAGE_TOTALS, progress_key("topic", 0), RecordCodec("usage-progress").encode(record))


class FakeAnswer(NamedTuple):
    offset: int

    def result(self):
        return self


class FakeMessage:
    def __init__(self, topic, offset, key, value):
        self.values = {"topic": topic, "partition": 0, "offset": offset, "key": key, "value": value}

    def __getattr__(self, name):
        return lambda: self.values.get(name)


@pytest.fixture
def log():
    return FakeLog()


@pytest.fixture
def statements(log):
    made = LogStatements(KafkaSettings(), log, log)
    made._reached = dict.fromkeys(log.records, 0)
    return made


SHARD = Shard(
    number=0,
    generation=7,
    is_open=True,
    beat=3,
    run_id="run",
    partitions=1,
    topic_id="topic",
    skew_ms=0,
    accounted_until={SOURCE: 1},
    published_until={SOURCE: 10},
)
BUCKET = Bucket(
    client_id="acme",
    shard=SHARD,
    granted_micro=100 * MICRO,
    base_micro=0,
    lifetime_micro=30 * MICRO,
    provisional_micro=0,
    held_micro=0,
    period_start=None,
    totals={SOURCE: (10, 30 * MICRO)},
    provisional=(),
    reservations={},
    due={},
    is_watched=False,
)


def held(state="held", hold=5 * MICRO, time=FAR):
    """A bucket with one reservation."""
    one = Reservation("r1", state, 5 * MICRO, hold, time, 0, ())
    return replace(BUCKET, held_micro=hold, reservations={"r1": one}, due={"r1": time}, is_watched=True)


def whats(bucket, statements):
    """What is found wrong, in a word each."""
    return [one.what for one in differences("acme", bucket, statements)]


@pytest.fixture
def equal(log, statements):
    """The log that says what BUCKET is."""
    log.grant()
    log.total(4, 10 * MICRO)
    log.total(10, 30 * MICRO)
    log.progress(10)
    statements.read_to_end()
    return statements


def test_a_bucket_that_is_what_the_log_says_has_no_difference(equal):
    assert differences("acme", BUCKET, equal) == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"granted_micro": 101 * MICRO}, ["granted"]),
        ({"base_micro": 1}, ["base"]),
        ({"period_start": 5}, ["period start"]),
        ({"totals": {SOURCE: (10, 29 * MICRO)}, "lifetime_micro": 29 * MICRO}, ["consumed from topic/0"]),
        ({"totals": {SOURCE: (11, 30 * MICRO)}}, ["consumed from topic/0"]),
        ({"totals": {}, "lifetime_micro": 0}, ["consumed from topic/0"]),
        ({"lifetime_micro": 31 * MICRO}, ["lifetime consumption"]),
        ({"provisional_micro": 1}, ["provisional"]),
        ({"held_micro": 1}, ["reserved"]),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_each_number_of_a_bucket_is_compared(equal, changed, what):
    assert whats(replace(BUCKET, **changed), equal) == what


def test_a_bucket_behind_what_was_read_first_is_different(equal):
    """What the log said before the check began must be in the bucket."""
    behind = replace(BUCKET, totals={SOURCE: (4, 10 * MICRO)}, lifetime_micro=10 * MICRO)

    assert whats(behind, equal) == ["consumed from topic/0"]


def test_usage_in_flight_is_no_false_alarm(log, equal):
    """A bucket may stand at any statement since the first reading, with the amount of that statement."""
    log.total(20, 50 * MICRO)
    log.total(30, 70 * MICRO)
    equal.read_to_end()

    for cutoff, micro in ((10, 30 * MICRO), (20, 50 * MICRO), (30, 70 * MICRO)):
        stands = replace(BUCKET, totals={SOURCE: (cutoff, micro)}, lifetime_micro=micro)
        assert differences("acme", stands, equal) == []
    torn = replace(BUCKET, totals={SOURCE: (20, 70 * MICRO)}, lifetime_micro=70 * MICRO)
    assert whats(torn, equal) == ["consumed from topic/0"]


def test_a_client_of_the_log_without_a_bucket_is_a_difference(equal):
    assert whats(None, equal) == ["bucket"]
    assert differences("nobody", None, equal) == []


def test_a_grant_counts_once_and_the_first_baseline_of_a_period_wins(log, statements):
    """Copies, late and repeated periods give nothing; what is given within a period adds to its budget."""
    log.grant("g1", 100 * MICRO)
    log.grant("g1", 900 * MICRO)
    log.grant("p1", 50 * MICRO, "baseline", start=1_000, base=(20 * MICRO, 5 * MICRO))
    log.grant("p1-again", 70 * MICRO, "baseline", start=1_000)
    log.grant("p0", 80 * MICRO, "baseline", start=500)
    log.grant("b1", 60 * MICRO, "budget", start=500)
    log.grant("g2", 7 * MICRO)
    log.grant("g2", 900 * MICRO)
    log.grant("g3", 0)
    statements.read_to_end()

    assert statements.funds("acme") == [Funds(57 * MICRO, 25 * MICRO, 1_000)]


def test_two_totals_of_one_cutoff_are_told(log, statements):
    log.total(10, 30 * MICRO)
    log.total(10, 31 * MICRO)
    log.total(4, 10 * MICRO)  # an older one that comes late says nothing wrong
    statements.read_to_end()

    assert len(statements.contradictions) == 1
    assert statements.totals("acme")[SOURCE][-1].credits_micro == 30 * MICRO


def test_foreign_records_are_counted_and_passed_by(log, statements):
    log.append(CREDIT_GRANTS, b"acme", b"not ours")
    log.append(USAGE_TOTALS, b"other", b"not ours")
    statements.read_to_end()

    assert statements.not_understood == 2


def test_settled_work_that_is_accounted_must_not_stay_provisional(equal):
    """It would be charged twice: by the total and as provisional."""
    entry = Provisional(SOURCE, 10, 3 * MICRO)
    stuck = replace(BUCKET, provisional=(entry,), provisional_micro=3 * MICRO, is_watched=True)
    ahead = replace(stuck, provisional=(entry._replace(offset=11),))

    assert whats(stuck, equal) == ["provisional topic/0 offset 10"]
    assert whats(ahead, equal) == []


def test_a_hold_the_log_has_passed_is_stranded(equal):
    """Its worker is gone and its deadline accounted: nobody but the sweep would free it."""
    bucket = held(time=1_000)
    late = replace(SHARD, accounted_until={SOURCE: 2_000})

    assert whats(bucket, equal) == [], "the log's clock has not passed it"
    assert whats(replace(bucket, shard=late), equal) == ["reservation r1"]


def test_an_ended_reservation_holds_nothing(equal):
    assert whats(held(state="void"), equal) == ["reservation r1"]


def test_what_nobody_would_ever_sweep_is_found(equal):
    """A hold that is not among those due, or of a bucket the sweep does not know, would stand for ever."""
    assert whats(replace(held(), due={}), equal) == ["reservation r1"]
    assert whats(replace(held(), is_watched=False), equal) == ["sweep"]
