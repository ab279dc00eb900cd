"""The rules of credit buckets: never oversold, never leaked, whatever is repeated and in whatever order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.buckets import (
    BUCKET_MICRO_MAX,
    PARTS_MAX,
    TERMINAL_KEEP_MS,
    Bucket,
    Shard,
    parse_balance,
    why_refused,
)

TOPIC = "AbCdEfGhIjKlMnOpQrStUv"
TTL = 100
LATE = 10**9
FINAL, MORE = True, False


def open_bucket(granted=0, *, generation=3, partitions=2, skew_ms=0):
    shard = Shard()
    shard.begin(generation, partitions=partitions, topic_id=TOPIC, skew_ms=skew_ms)
    shard.open_up(generation)
    bucket = Bucket(shard)
    bucket.grant("first", granted)
    return bucket


def accounted(bucket, until, published=-1):
    for p in range(bucket.shard.partitions):
        bucket.shard.progress(bucket.shard.generation, TOPIC, p, published, until)


rids = st.sampled_from(["a/1", "b/1", "c/2"])
small = st.integers(0, 10)
parts = st.lists(st.tuples(st.just(TOPIC), st.integers(0, 1), st.integers(0, 12), small), max_size=3)
ops = st.one_of(
    st.tuples(st.just("r"), rids, small, st.sampled_from([1, TTL])),
    st.tuples(st.just("s"), rids, parts, st.integers(0, 1)),
    st.tuples(st.just("v"), rids),
    st.tuples(st.just("n"), rids, small, st.just(TTL), st.integers(1, 3)),
    st.tuples(st.just("l"), rids, st.integers(1, 4), small, parts, st.just(TTL)),
    st.tuples(st.just("T"), st.just(TOPIC), st.integers(0, 1), st.integers(0, 12), st.integers(-5, 30)),
    st.tuples(st.just("G"), st.sampled_from("ghi"), small),
    st.tuples(st.just("P"), st.integers(0, 3), st.integers(-5, 30), small),
    st.tuples(st.just("e")),
)


def snapshot(bucket):
    records = {
        rid: (r.state, r.hold, r.reserved, r.seq, frozenset(r.positions)) for rid, r in bucket.records.items()
    }
    return bucket.balance(), frozenset(bucket.provisional), records, frozenset(bucket.grants)


@given(st.lists(ops, max_size=40))
def test_a_reserve_never_takes_what_is_not_there(batch):
    """Invariant: only the log, a re-asserted hold and a new baseline may lead into debt."""
    bucket = open_bucket(20)
    for now, op in enumerate(batch):
        before = bucket.available
        answer = bucket.apply(op, now)
        if op[0] == "r":
            assert bucket.available in {before, before - op[2]}
            assert bucket.available == before or (answer.startswith("g ") and bucket.available >= 0)
        assert all(record.hold >= 0 for record in bucket.records.values())
        assert all(record.hold == 0 for record in bucket.records.values() if record.state != "held")


@given(st.lists(ops, max_size=25))
def test_every_operation_may_be_repeated(batch):
    """A call whose answer was lost is made again: at once or, being a statement, any time later."""
    bucket = open_bucket(20)
    for now, op in enumerate(batch):
        bucket.apply(op, now)
        first = snapshot(bucket)
        bucket.apply(op, now)

        assert snapshot(bucket) == first


settles = st.lists(
    st.tuples(rids, st.lists(st.integers(0, 12), max_size=3), st.booleans()), min_size=1, max_size=8
)


@given(settles, st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4), st.randoms())
def test_statements_in_any_order_give_the_same_balance(said, totals, random):
    """Settles, totals and progress are true for ever, so nobody needs to deliver them in order (Q2)."""
    life_at = {}
    statements = [
        ("s", rid, [(TOPIC, 0, o, o + 1) for o in offsets], int(final)) for rid, offsets, final in said
    ]
    for cutoff, life in totals:
        life_at.setdefault(cutoff, life)
    statements += [("T", TOPIC, 0, cutoff, life) for cutoff, life in life_at.items()]

    def outcome(order):
        bucket = open_bucket(1_000)
        for rid in ("a/1", "b/1", "c/2"):
            bucket.reserve(rid, 50, TTL, 0)
        for statement in order:
            bucket.apply(statement, 1)
        return bucket.balance()

    shuffled = [*statements, *statements]
    random.shuffle(shuffled)

    assert outcome(shuffled)[:3] == outcome(statements)[:3]
    assert outcome(shuffled).reserved == outcome(statements).reserved


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_a_rebuilt_bucket_equals_the_live_one(amounts, random):
    """All that a bucket is, once nothing is in flight, comes from the log: grants and totals (Q8)."""
    live, lives = open_bucket(200), [0, 0]
    totals = []
    for offset, amount in enumerate(amounts):
        p = offset % 2
        live.reserve(f"t{offset}", amount, TTL, offset)
        if offset % 3:
            live.settle(f"t{offset}", [(TOPIC, p, offset, amount)], offset % 5 != 0, offset)
        lives[p] += amount
        totals.append((TOPIC, p, offset, lives[p]))
        if random.random() < 0.5:
            live.total(*totals[-1])
    for total in totals[-2:]:
        live.total(*total)
    accounted(live, LATE, published=len(amounts))
    live.expire(LATE)

    rebuilt = Bucket(Shard())
    rebuilt.shard.begin(9, partitions=2, topic_id=TOPIC, skew_ms=0)
    rebuilt.grant("first", 200)
    for total in random.sample(totals, len(totals)):
        rebuilt.total(*total)

    assert rebuilt.balance()[:5] == live.balance()[:5] == (200, sum(amounts), 0, 0, 200 - sum(amounts))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 50))
def test_a_hold_ends_by_the_clock_of_the_log(now, first, second, skew):
    """Q1: past the deadline, and accounted past it on every partition; the skew of the clocks on top."""
    bucket = open_bucket(10, skew_ms=skew)
    bucket.reserve("a/1", 10, TTL, 0)
    bucket.shard.progress(3, TOPIC, 0, -1, first)
    bucket.shard.progress(3, TOPIC, 1, -1, second)
    bucket.expire(now)

    assert (bucket.available == 10) == (now > TTL and min(first, second) >= TTL + skew)


def test_a_hold_stands_while_one_partition_is_unknown():
    """Q1: a partition that was added counts before anything is known of it."""
    bucket = open_bucket(10, partitions=3)
    bucket.reserve("a/1", 10, TTL, 0)
    bucket.shard.progress(3, TOPIC, 0, -1, LATE)
    bucket.shard.progress(3, TOPIC, 1, -1, LATE)

    assert bucket.expire(LATE) == "ok 0"
    bucket.shard.progress(3, TOPIC, 2, -1, LATE)
    assert bucket.expire(LATE) == "ok 1"


def test_parts_lower_a_hold_by_themselves_and_the_last_one_frees_the_rest():
    """Q2: settled in parts, each once."""
    bucket = open_bucket(20)
    bucket.reserve("a/1", 10, TTL, 0)
    for _ in range(2):
        bucket.settle("a/1", [(TOPIC, 0, 5, 3)], MORE, 1)
        assert bucket.balance()[1:5] == (0, 3, 7, 10)
    bucket.settle("a/1", [(TOPIC, 0, 5, 3), (TOPIC, 0, 6, 9)], FINAL, 1)

    assert bucket.balance()[1:5] == (0, 12, 0, 8)


def test_a_part_covered_by_the_log_is_never_provisional():
    """A settle that comes after the total, or after the progress, adds nothing."""
    bucket = open_bucket(20)
    bucket.total(TOPIC, 0, 5, 3)
    bucket.settle("a/1", [(TOPIC, 0, 5, 3)], FINAL, 0)
    bucket.shard.progress(3, TOPIC, 1, 8, 0)
    bucket.settle("b/1", [(TOPIC, 1, 8, 3)], FINAL, 0)

    assert bucket.balance()[1:5] == (3, 0, 0, 17)


def test_the_progress_settles_what_changed_no_total():
    """Q5: a duplicate or a dead letter was settled, and no total will ever cover it."""
    bucket = open_bucket(20)
    bucket.settle("a/1", [(TOPIC, 0, 5, 3), (TOPIC, 0, 6, 4)], FINAL, 0)
    accounted(bucket, 0, published=5)
    bucket.expire(0)

    assert bucket.balance().provisional == 4


def test_a_total_with_an_old_cutoff_changes_nothing_and_a_contradiction_is_told():
    bucket = open_bucket(20)

    assert [bucket.total(TOPIC, 0, *said) for said in [(5, 9), (4, 2), (5, 9), (5, 8)]] == [
        "ok",
        "o",
        "o",
        "!",
    ]
    assert bucket.balance().consumed == 9


def test_an_ended_id_stays_ended():
    """Q4: an id is one attempt of one task."""
    bucket = open_bucket(20)
    bucket.reserve("void", 5, TTL, 0)
    bucket.void("void", 0)
    bucket.reserve("done", 5, TTL, 0)
    bucket.settle("done", [(TOPIC, 0, 1, 5)], FINAL, 0)
    bucket.reserve("held", 5, TTL, 0)
    answers = [bucket.reserve(rid, 5, TTL, 1) for rid in ("void", "done", "held", "held")]

    assert answers == ["t", "d", f"g {TTL} 3", f"g {TTL} 3"]
    assert bucket.reserve("held", 6, TTL, 1) == "x 5"
    assert bucket.void("done", 1) == "s"
    assert bucket.available == 10


def test_a_late_reserve_after_its_void_or_its_settle_takes_no_hold():
    """A caller whose reserve got no answer gives up; the call may still arrive."""
    bucket = open_bucket(20)

    assert bucket.void("a/1", 0) == "u"
    assert bucket.reserve("a/1", 5, TTL, 0) == "t"
    bucket.settle("b/1", [(TOPIC, 0, 0, 5)], FINAL, 0)
    assert bucket.reserve("b/1", 5, TTL, 0) == "d"
    assert bucket.balance().reserved == 0


def test_a_void_never_frees_a_hold_that_has_parts_twice():
    """Q3: what was published stays charged."""
    bucket = open_bucket(20)
    bucket.reserve("a/1", 10, TTL, 0)
    bucket.settle("a/1", [(TOPIC, 0, 5, 3)], MORE, 1)

    assert bucket.void("a/1", 1) == "s"
    assert bucket.balance()[1:5] == (0, 3, 0, 17)


def test_ended_reservations_are_forgotten_after_a_while():
    bucket = open_bucket(20)
    bucket.reserve("a/1", 10, TTL, 0)
    bucket.void("a/1", 5)
    bucket.expire(5 + TERMINAL_KEEP_MS)
    assert set(bucket.records) == {"a/1"}
    bucket.expire(6 + TERMINAL_KEEP_MS)
    assert bucket.records == {}


def test_lease_statements_are_absolute_and_numbered():
    """Q7: late and repeated ones change nothing; a raise takes only what is there."""
    bucket = open_bucket(20)
    bucket.reserve("l", 15, TTL, 0)

    assert bucket.lease("l", 2, 6, [(TOPIC, 0, 1, 9)], TTL, 3, 1) == f"g {TTL + 1} 6"
    assert bucket.lease("l", 1, 15, [], TTL, 3, 1) == "o"
    assert bucket.lease("l", 2, 6, [(TOPIC, 0, 1, 9)], TTL, 3, 1) == "o"
    assert bucket.balance()[1:5] == (0, 9, 6, 5)
    assert bucket.lease("l", 3, 12, [], TTL, 3, 1) == f"g {TTL + 1} 6"
    assert bucket.lease("l", 4, 11, [], TTL, 3, 1) == f"g {TTL + 1} 11"
    assert bucket.available == 0


def test_a_lapsed_lease_still_says_what_was_published():
    bucket = open_bucket(20)
    bucket.reserve("l", 15, TTL, 0)
    accounted(bucket, LATE)
    bucket.expire(LATE)

    assert bucket.lease("l", 1, 6, [(TOPIC, 0, 1, 9)], TTL, 3, LATE) == "l"
    assert bucket.balance()[1:5] == (0, 9, 0, 11)


def test_a_lost_bucket_is_closed_and_holds_come_back_by_renewing():
    """Q8: whatever is available; in the generation it was reserved in, an unknown id has lapsed."""
    bucket = open_bucket(20)
    bucket.reserve("a/1", 10, TTL, 0)
    bucket.shard.begin(4, partitions=2, topic_id=TOPIC, skew_ms=0)

    assert bucket.reserve("b/1", 1, TTL, 1) == "c"
    assert bucket.renew("a/1", 10, TTL, 4, 1) == "l"
    assert bucket.renew("a/1", 10, TTL, 3, 1) == f"g {TTL + 1} 4"
    assert bucket.lease("l", 5, 2, [(TOPIC, 0, 1, 9)], TTL, 3, 1) == f"g {TTL + 1} 2"
    assert bucket.balance() == (0, 0, 9, 12, -21, False, 4, None)


def test_a_restarted_server_decides_nothing():
    """Known holds included: it may have lost its last second."""
    bucket = open_bucket(20)
    bucket.reserve("a/1", 10, TTL, 0)
    bucket.shard.server_run = "another"

    assert bucket.reserve("a/1", 10, TTL, 1) == "c"
    assert bucket.renew("b/1", 4, TTL, 3, 1) == f"g {TTL + 1} 3"
    assert bucket.shard.progress(3, TOPIC, 0, 1, 1) == "r"
    assert bucket.shard.adopt(3) == "ok"
    assert bucket.reserve("a/1", 10, TTL, 1) == f"g {TTL} 3"


def test_progress_of_older_buckets_is_refused():
    """It vouches for totals that the new, empty buckets have not seen."""
    bucket = open_bucket(20)
    bucket.shard.begin(4, partitions=2, topic_id=TOPIC, skew_ms=0)

    assert bucket.shard.progress(3, TOPIC, 0, 9, LATE) == "0"
    assert bucket.shard.begin(4, partitions=2, topic_id=TOPIC, skew_ms=0) == "o"
    assert bucket.shard.published_until == {}


def test_the_first_baseline_of_a_period_wins():
    """Q9."""
    bucket = open_bucket(20)
    bucket.total(TOPIC, 0, 5, 9)
    said = [(2, 9, 50), (2, 12, 60), (1, 0, 70), (3, 9, 5)]

    assert [bucket.baseline(*baseline) for baseline in said] == ["ok", "o", "o", "ok"]
    assert bucket.balance()[:5] == (5, 0, 0, 0, 5)
    assert bucket.balance().period_start == 3


def test_beyond_exact_amounts_an_operation_is_refused_and_changes_nothing():
    bucket = open_bucket(BUCKET_MICRO_MAX)
    before = snapshot(bucket)
    answers = [
        bucket.grant("g", 1),
        bucket.total(TOPIC, 0, 5, -1),
        bucket.settle("a", [(TOPIC, 0, o, BUCKET_MICRO_MAX) for o in (1, 2, 3)], FINAL, 0),
        bucket.baseline(1, 1, BUCKET_MICRO_MAX),
    ]

    assert {answer[:8] for answer in answers} == {"e beyond"}
    assert snapshot(bucket) == before
    assert bucket.settle("b", [(TOPIC, 0, o, 1) for o in range(PARTS_MAX + 1)], FINAL, 0).startswith(
        "e a res"
    )
    assert snapshot(bucket) == before


def test_operations_of_a_wrong_shape_are_refused_by_name():
    wrong = [[], ["q"], ["r", "a", 1.5, 1], ["r", "a", True, 1], ["r", "", 1, 1], ["r", "a", -1, 1], ["b", 1]]
    wrong += [["s", "a", [[TOPIC, 0, 1]], 1], ["s", "a", None, 1], ["T", "a:b", 0, 1, 1], ["G", "g", 2**53]]

    assert all(why_refused(op).startswith("e ") for op in wrong)
    assert open_bucket().apply(wrong[1], 0) == "e unknown operation 'q'"


@given(st.integers(0, 99), st.booleans(), st.none() | st.integers(0, 10**13))
def test_a_balance_is_read_as_it_was_written(granted, is_open, period):
    bucket = open_bucket(granted)
    bucket.shard.open = is_open
    if period is not None:
        bucket.baseline(period, 0, granted)

    assert parse_balance(bucket.apply(["b"], 0)) == (granted, 0, 0, 0, granted, is_open, 3, period)
