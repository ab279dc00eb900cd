"""Leases against the model of the bucket, over a line that loses and repeats: no credit is there twice."""

from __future__ import annotations

import asyncio
import random

import pytest

from meterline.domain.buckets import Bucket, Shard
from meterline.domain.clients import QuotaPolicy
from meterline.quota import (
    CreditBuckets,
    CreditsExhausted,
    LeasePlan,
    Part,
    QuotaUnavailable,
    Reservation,
    ReservationConflict,
    ReservationLapsed,
    operations,
)
from meterline.quota import lease as lease_module
from meterline.quota import reservations as reservations_module
from meterline.quota.answers import SettledColumns
from meterline.quota.availability import Availability, Unreachable
from meterline.quota.reservations import Held, Reservations

M = 1_000_000
CLIENT = "hot"
TOPIC_ID = "usage.events"
PLAN = LeasePlan(calls_per_s=20, share_max=0.1, ttl_s=10, interval_ms=1)


class Line:
    """What carries operations to one bucket of the model; the invariants are looked at after each."""

    def __init__(self, credits_micro, seed=0):
        self.shard = Shard()
        self.shard.begin(1, partitions=1, topic_id=TOPIC_ID, skew_ms=0)
        self.shard.open_up(1)
        self.bucket = Bucket(self.shard)
        self.bucket.grant("grant", credits_micro)
        self.availability = Availability(self._nobody)
        self.random = random.Random(seed)
        self.loses = self.repeats = self.delays = 0.0
        self.is_away = False
        self.sent = []
        self.late = []
        self.now_ms = 1_000_000
        self.lease_hold_max = 0
        self.debt = 0
        self.before = lambda _op: None
        self.after = lambda _op: None

    async def _nobody(self):
        raise Unreachable("nobody")

    def route(self, _client_id):
        return self

    def submit(self, client_id, op):
        assert client_id == CLIENT
        return asyncio.ensure_future(self._carry(operations.as_array(op)))

    submit_first = submit

    async def close(self):
        pass

    async def _carry(self, op):
        chance = self.random.random
        if chance() < self.delays:
            await asyncio.sleep(self.random.uniform(0, 0.003))
        if self.is_away:
            raise Unreachable("away")
        if self.late and chance() < self.repeats:
            self._apply(self.random.choice(self.late))
        lost = chance() < self.loses
        if lost and chance() < 0.5:
            raise Unreachable("the call was lost")
        self.before(op)
        answer = self._apply(op)
        self.after(op)
        self.late = [*self.late[-20:], op]
        if lost:
            raise Unreachable("the answer was lost")
        return answer.encode()

    def _apply(self, op):
        self.sent.append(op)
        answer = self.bucket.apply(op, self.now_ms)
        holds = [record.hold for rid, record in self.bucket.records.items() if rid.startswith("lease/")]
        self.lease_hold_max = max(self.lease_hold_max, sum(holds))
        self.debt = min(self.debt, self.bucket.available)
        return answer

    def lease_statements(self):
        return [op for op in self.sent if op[0] == "l"]

    def settled_micro(self):
        return self.bucket.provisional_sum


def deny(_client_id):
    return QuotaPolicy.DENY


def run(scenario, *, budget=10_000, plan=PLAN, seed=0):
    line = Line(budget * M, seed)

    async def whole():
        buckets = CreditBuckets(line, deny, plan)
        try:
            await scenario(line, buckets)
        finally:
            line.loses = line.repeats = 0.0
            await buckets.close()

    asyncio.run(whole())
    return line


async def heat(buckets, calls=10):
    """Make the client hot, and wait for its lease."""
    for number in range(calls):
        await buckets.reserve(CLIENT, 1, reservation_id=f"warm/{number}")
        await buckets.void(f"warm/{number}")
    await until(lambda: CLIENT in buckets._leases.active)
    return buckets._leases.active[CLIENT]


async def until(is_so):
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - several objects change
            await asyncio.sleep(0.001)


def part(offset, micro=M):
    return Part(TOPIC_ID, 0, offset, micro)


def test_a_hot_client_is_decided_here_and_everything_arrives():
    async def scenario(line, buckets):
        await heat(buckets)
        before = len([op for op in line.sent if op[0] == "r"])
        for number in range(300):
            made = await buckets.reserve(CLIENT, 1, reservation_id=f"t/{number}")
            assert made.covered
            await buckets.settle(f"t/{number}", [part(number)])

        assert len([op for op in line.sent if op[0] == "r"]) - before < 50

    line = run(scenario)
    assert line.settled_micro() == 300 * M
    assert (line.bucket.reserved, line.bucket.available) == (0, 9_700 * M)


def test_a_lease_stays_within_its_share_of_the_budget():
    async def scenario(_line, buckets):
        await heat(buckets)
        for number in range(2_000):
            await buckets.reserve(CLIENT, 3, reservation_id=f"t/{number}")
            if number >= 100:
                await buckets.settle(f"t/{number - 100}", [part(number, 3 * M)])
            if number % 10 == 0:
                await asyncio.sleep(0)

    line = run(scenario)
    assert 300 * M < line.lease_hold_max <= 10_000 * M * PLAN.share_max


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_sold_twice_whatever_the_line_does(seed):
    """Calls and answers are lost, copies arrive late. Every part is within its reservation, so the bucket
    must never be in debt, and in the end it must say what the tasks counted."""
    counted = {"settled": 0, "held": 0}

    async def scenario(line, buckets):
        await heat(buckets)
        line.loses, line.repeats, line.delays = 0.1, 0.2, 0.3
        chance = random.Random(seed)
        offsets = iter(range(1_000_000))

        async def task(name):
            for number in range(60):
                rid, wanted = f"{name}/{number}", chance.randint(1, 9)
                try:
                    await buckets.reserve(CLIENT, wanted, reservation_id=rid)
                except (CreditsExhausted, QuotaUnavailable):
                    await asyncio.sleep(0.001)
                    continue
                await asyncio.sleep(chance.choice([0, 0, 0.001]))
                if chance.random() < 0.2:
                    await again(buckets.void, rid)
                elif chance.random() < 0.1:
                    counted["held"] += wanted * M  # nobody ends this one
                else:
                    cost = chance.randint(0, wanted)
                    named = [part(next(offsets), cost * M)]
                    if chance.random() < 0.3:
                        await again(buckets.settle, rid, named, final=False)
                    await again(buckets.settle, rid, named)
                    counted["settled"] += cost * M

        await asyncio.gather(*(task(f"task-{n}") for n in range(8)))

    line = run(scenario, budget=2_000, seed=seed)
    assert line.debt == 0
    assert line.settled_micro() == counted["settled"]
    # A reserve whose answer was lost may have left a hold at the server that nobody knows of.
    assert line.bucket.reserved >= counted["held"]
    assert line.bucket.granted >= line.bucket.provisional_sum + line.bucket.reserved


async def again(call, *args, **options):
    while True:
        try:
            return await call(*args, **options)
        except QuotaUnavailable:
            await asyncio.sleep(0)


def is_raise(op, lease):
    return op[0] == "l" and op[3] > lease._stands_for()


def test_a_refused_raise_whose_answer_was_lost_is_not_counted_on():
    """The repeated message is an old one to the bucket, and what it had said to it is not known."""

    async def scenario(line, buckets):
        lease = await heat(buckets)
        await until(lambda: lease._waker is not None)
        known, refused = lease._stands_for(), []

        def take_the_rest(op):
            if is_raise(op, lease) and not refused:
                line.bucket.grant("cut", -line.bucket.available)

        def lose_the_answer(op):
            if is_raise(op, lease) and not refused:
                refused.append(op)
                raise Unreachable("the answer was lost")

        line.before, line.after = take_the_rest, lose_the_answer
        lease._missed = lease.free + M
        lease._low = 10**15
        lease.free, lease.decided = 0, lease.decided + lease.free
        lease.wake()
        await until(lambda: refused and len([op for op in line.sent if op[1:3] == refused[0][1:3]]) == 2)
        await until(lambda: lease._waker is not None or lease.is_retired)

        assert lease._stands_for() <= known
        lease.free, lease.decided = lease.free + lease.decided, 0

    run(scenario)


def test_after_its_deadline_a_lease_decides_nothing(monkeypatch):
    async def scenario(_line, buckets):
        lease = await heat(buckets)
        assert lease.free > 10 * M
        real = lease_module.now_s
        with monkeypatch.context() as patch:
            patch.setattr(lease_module, "now_s", lambda: real() + 3_600)

            assert lease.take("late", M, 60.0) is None
            assert lease.take_many(("late",), [M], 60.0) == {"late": None}
            with pytest.raises(Unreachable):
                lease.renew(60.0)
        assert lease.take("in time", M, 60.0) is not None

    run(scenario)


def test_work_of_a_lapsed_lease_goes_on_as_reservations_of_its_own():
    async def scenario(line, buckets):
        lease = await heat(buckets)
        await buckets.reserve(CLIENT, 2, reservation_id="t/1")
        await buckets.reserve(CLIENT, 2, reservation_id="t/2")
        line.bucket.records[lease.reservation_id].state = "expired"
        line.bucket.records[lease.reservation_id].hold = 0
        lease.wake()
        await until(lambda: CLIENT not in buckets._leases.active)

        await buckets.settle("t/1", [part(1, 2 * M)])
        assert line.settled_micro() == 2 * M
        with pytest.raises(ReservationLapsed):
            await buckets.renew("t/2", 30)

    run(scenario)


def test_a_rebuilt_bucket_takes_the_lease_as_it_is_and_gives_it_nothing():
    """The rebuild comes between a lease's wish for more and its arrival: nobody asked if there is more."""

    async def scenario(line, buckets):
        lease = await heat(buckets)
        await until(lambda: lease._waker is not None)
        known = []

        def rebuild(op):
            if is_raise(op, lease) and not known:
                known.append(lease._stands_for())
                line.shard.begin(2, partitions=1, topic_id=TOPIC_ID, skew_ms=0)

        line.before = rebuild
        lease._missed = lease.free + M
        lease.free, lease.decided = 0, lease.decided + lease.free
        lease.wake()
        await until(lambda: known and lease.generation == 2)

        assert lease._stands_for() == known[0]
        assert lease.free == 0
        lease.free, lease.decided = lease.decided, 0

    run(scenario)


def test_near_zero_the_lease_is_given_back_and_the_last_credit_is_found():
    async def scenario(line, buckets):
        await heat(buckets)
        reserved = 0
        while reserved < 1_000:
            await buckets.reserve(CLIENT, 1, reservation_id=f"t/{reserved}")
            await buckets.settle(f"t/{reserved}", [part(reserved)])
            reserved += 1
        with pytest.raises(CreditsExhausted):
            await buckets.reserve(CLIENT, 1, reservation_id="one too many")

        assert reserved == 1_000
        assert line.debt == 0

    run(scenario, budget=1_000)


def test_one_id_is_one_reservation_also_under_a_lease():
    async def scenario(_line, buckets):
        await heat(buckets)
        first = await buckets.reserve(CLIENT, 2, reservation_id="t/1", ttl_s=30)
        assert await buckets.reserve(CLIENT, 2, reservation_id="t/1", ttl_s=30) == first
        with pytest.raises(ReservationConflict):
            await buckets.reserve(CLIENT, 3, reservation_id="t/1")
        await buckets.settle("t/1", [part(1, M)], final=False)
        assert await buckets.reserve(CLIENT, 2, reservation_id="t/1", ttl_s=30) == first
        await buckets.settle("t/1", [part(1, M)])

        assert (await buckets.reserve(CLIENT, 2, reservation_id="t/1")).done
        await buckets.reserve(CLIENT, 2, reservation_id="t/2")
        await buckets.void("t/2")
        with pytest.raises(ReservationLapsed):
            await buckets.reserve(CLIENT, 2, reservation_id="t/2")

    run(scenario)


def test_a_bulk_call_is_many_single_calls():
    async def scenario(line, buckets):
        await heat(buckets)
        wanted = {f"t/{number}": 1 for number in range(500)}
        assert await buckets.reserve_many(CLIENT, wanted) == {}
        again = await buckets.reserve_many(CLIENT, {"t/0": 1, "t/1": 2, "t/500": 1})
        assert [(rid, type(why)) for rid, why in again.items()] == [("t/1", ReservationConflict)]
        await buckets.void("t/500")
        settled = {rid: (part(n),) for n, rid in enumerate(wanted)}
        await buckets.settle_many(CLIENT, settled)
        await buckets.settle_many(CLIENT, settled)
        again = await buckets.reserve_many(CLIENT, {"t/0": 1, "t/500": 1})
        assert again["t/0"].done
        assert isinstance(again["t/500"], ReservationLapsed)
        await until(lambda: line.settled_micro() == 500 * M)

    line = run(scenario)
    assert line.settled_micro() == 500 * M
    assert line.bucket.reserved == 0


def test_a_raise_never_travels_with_parts():
    """A raise that is refused leaves the hold as it was: parts beside it would be held and charged."""

    async def scenario(line, buckets):
        lease = await heat(buckets)
        for number in range(1_000):
            await buckets.reserve(CLIENT, 1, reservation_id=f"t/{number}")
            await buckets.settle(f"t/{number}", [part(number)])
        holds = {}
        for _, rid, _, hold, parts, *_ in line.lease_statements():
            if parts and rid == lease.reservation_id:
                assert hold + sum(micro for *_, micro in parts) <= holds.get(rid, lease._share)
            holds[rid] = hold

    run(scenario)


def test_a_statement_carries_one_part_for_each_partition():
    """The largest offset and the sum: the bucket keeps it until the log has accounted all of them."""

    async def scenario(line, buckets):
        lease = await heat(buckets)
        await until(lambda: lease._waker is not None)
        wanted = {f"t/{number}": 2 for number in range(60)}
        await buckets.reserve_many(CLIENT, wanted)
        await buckets.reserve(CLIENT, 2, reservation_id="single")
        for partition in range(3):
            named = {
                rid: (Part(TOPIC_ID, partition, 200 - n, M),)
                for n, rid in enumerate(wanted)
                if n % 3 == partition
            }
            await buckets.settle_many(CLIENT, named)
        await buckets.settle("single", [Part(TOPIC_ID, 0, 150, M), Part(TOPIC_ID, 2, 300, 5 * M)])
        await until(lambda: line.settled_micro() == 66 * M)

        assert [op[4] for op in line.lease_statements() if op[4]] == [
            [[TOPIC_ID, 0, 200, 21 * M], [TOPIC_ID, 1, 199, 20 * M], [TOPIC_ID, 2, 300, 25 * M]]
        ]
        line.bucket.total(TOPIC_ID, 2, 299, 20 * M)
        assert line.bucket.available < 10_000 * M - 66 * M  # for a moment, too little
        line.bucket.total(TOPIC_ID, 2, 300, 25 * M)
        assert line.settled_micro() == 41 * M

    line = run(scenario)
    assert (line.bucket.reserved, line.bucket.available) == (0, 9_934 * M)


def test_more_partitions_than_one_statement_takes_are_told_in_several():
    partitions = lease_module.STATEMENT_PARTS_MAX + 500

    async def scenario(line, buckets):
        await heat(buckets)
        await buckets.reserve(CLIENT, 30, reservation_id="wide")
        for first in range(0, partitions, 500):
            named = [Part(TOPIC_ID, n, n, 20_000) for n in range(first, first + 500)]
            await buckets.settle("wide", named, final=first + 500 == partitions)
        await until(lambda: line.settled_micro() == partitions * 20_000)

        assert max(len(op[4]) for op in line.lease_statements()) == lease_module.STATEMENT_PARTS_MAX

    line = run(scenario)
    assert line.debt == 0
    assert line.bucket.reserved == 0
    assert line.bucket.available == 10_000 * M - partitions * 20_000


def test_a_settle_that_is_repeated_counts_once_also_in_a_sum():
    async def scenario(line, buckets):
        lease = await heat(buckets)
        for name in ("whole", "in pieces", "lapsed"):
            await buckets.reserve(CLIENT, 9, reservation_id=name)
        await buckets.settle("in pieces", [part(1)], final=False)
        await buckets.settle("lapsed", [part(2)], final=False)
        await buckets.settle("in pieces", [part(1), part(3)])
        await buckets.settle("whole", [part(4), part(5)])
        await until(lambda: line.settled_micro() == 5 * M)
        line.bucket.records[lease.reservation_id].state = "expired"
        lease.wake()
        await until(lambda: CLIENT not in buckets._leases.active)

        await buckets.settle("in pieces", [part(1)], client_id=CLIENT)
        await buckets.settle("in pieces", [part(1), part(3)], client_id=CLIENT)
        await buckets.settle("whole", [part(4), part(5)], client_id=CLIENT)
        await buckets.settle_many(CLIENT, {"whole": (part(4), part(5)), "lapsed": [part(2)]})
        assert line.settled_micro() == 5 * M
        await buckets.settle("whole", [part(6)], client_id=CLIENT)
        assert line.settled_micro() == 6 * M

    run(scenario)


def test_a_bulk_settle_leaves_what_another_lease_holds():
    async def scenario(_line, buckets):
        lease = await heat(buckets)
        await buckets.reserve(CLIENT, 1, reservation_id="ours")
        theirs = Held(object(), 7)
        buckets._reservations.stand("theirs", theirs)

        columns = SettledColumns((TOPIC_ID, 0), (1, 2, 3), (M, M, M))
        assert lease.settle_many(("theirs", "ours", "nobody's"), columns) == [0, 2]
        assert buckets._reservations.entries.pop("theirs") == theirs
        assert (lease.decided, lease.unstated.micro) == (0, M)

    run(scenario)


def test_an_id_that_stands_again_takes_no_place_of_the_ended(monkeypatch):
    """The bucket forgets an ended id sooner than a process, and grants it anew."""
    monkeypatch.setattr(reservations_module, "ENDED_MAX", 1)
    known = Reservations()
    known.voided("a", CLIENT)
    known.stand("a", Reservation("a", CLIENT, M, 60.0, 1, done=False, covered=True))
    known.voided("b", CLIENT)

    assert known.client_of("b") == CLIENT


ORDER = [f"t/{n}" for n in range(6)]
WANTED = {rid: n + 2 for n, rid in enumerate(ORDER)}


async def ends_by_itself(how, line, buckets, lease):
    """What happens to one of a bulk call; what was settled of it, if it has ended (micro-credits)."""
    match how:
        case "void":
            await buckets.void("t/1")
            return {"t/1": 0}
        case "settle":
            await buckets.settle("t/1", [part(1, M)])
            return {"t/1": M}
        case "in part":
            await buckets.settle("t/1", [part(1, M)], final=False)
            await buckets.settle("t/1", [part(1, M), part(100, M)])
            return {"t/1": 2 * M}
        case "ask again":
            assert await buckets.reserve_many(CLIENT, dict(list(WANTED.items())[:2])) == {}
        case "renew":
            await buckets.renew("t/1", 30)
        case "lapse":
            line.bucket.records[lease.reservation_id].state = "voided"
            line.bucket.records[lease.reservation_id].hold = 0
            lease.wake()
            await until(lambda: CLIENT not in buckets._leases.active)
            assert {type(buckets._reservations.entries[rid]) for rid in ORDER} == {Reservation}
    return {}


@pytest.mark.parametrize(
    "named", [ORDER, ORDER[::-1], ORDER[:4], [*ORDER, "single"]], ids=["just so", "turned", "some", "more"]
)
@pytest.mark.parametrize("first", ["nothing", "void", "settle", "in part", "ask again", "renew", "lapse"])
def test_what_a_bulk_call_reserved_is_settled_like_single_ones(named, first):
    """All in one change or one by one, as made or after one of them had a fate of its own. One costs more
    than was set aside for it."""

    async def scenario(line, buckets):
        lease = await heat(buckets)
        await buckets.reserve(CLIENT, 9, reservation_id="single")
        assert await buckets.reserve_many(CLIENT, WANTED) == {}
        ended = await ends_by_itself(first, line, buckets, lease)
        bulk = {rid: (part(n, 3 * M),) for n, rid in enumerate(named) if rid not in ended}
        if first == "settle":  # once more, among the others
            bulk = {rid: bulk.get(rid, (part(1, M),)) for rid in named}
        await buckets.settle_many(CLIENT, bulk)
        await buckets.settle_many(CLIENT, bulk)
        ended = dict.fromkeys(bulk, 3 * M) | ended
        await until(lambda: line.settled_micro() == sum(ended.values()))
        whole = {**WANTED, "single": 9}
        standing = sum(micro for rid, micro in whole.items() if rid not in ended) * M
        assert first == "lapse" or lease.decided == standing

        for rid, micro in whole.items():
            if rid not in ended:
                made = await buckets.reserve(CLIENT, micro, reservation_id=rid)
                assert (made.credits_micro, made.done) == (micro * M, False)
                with pytest.raises(ReservationConflict):
                    await buckets.reserve(CLIENT, micro + 1, reservation_id=rid)
                await buckets.void(rid)
            if ended.get(rid):
                assert (await buckets.reserve(CLIENT, micro, reservation_id=rid)).done
            else:
                with pytest.raises(ReservationLapsed):
                    await buckets.reserve(CLIENT, micro, reservation_id=rid)

    line = run(scenario)
    assert line.bucket.reserved == 0


def test_all_of_a_bulk_call_is_settled_by_one_change():
    async def scenario(_line, buckets):
        lease = await heat(buckets)
        await until(lambda: lease._waker is not None)
        free = lease.free
        await buckets.reserve_many(CLIENT, dict.fromkeys(ORDER, 2))
        (record,) = {id(buckets._reservations.entries[rid]) for rid in ORDER}
        await buckets.settle_many(CLIENT, {rid: [part(n, n * M)] for n, rid in enumerate(ORDER)})

        used = (0 + 1 + 2 + 2 + 2 + 2) * M  # what one costs beyond its own hold, is not taken from the lease
        assert (lease.free, lease.decided, lease.unstated.micro) == (free - used, 0, used)
        assert {id(buckets._reservations.entries[rid]) for rid in ORDER} == {record}

    run(scenario)


def test_the_oldest_that_ended_are_forgotten_those_that_stand_never(monkeypatch):
    """In bulk or one by one: what is remembered has a limit, and so has the list of what ended."""
    monkeypatch.setattr(reservations_module, "ENDED_MAX", 10)
    known = Reservations()
    lease = object()
    source = (TOPIC_ID, 0)
    standing = ("s/0", "s/1", "s/2")
    assert known.hold_new(standing, [M] * 3, lease)
    for number in range(60):
        names = tuple(f"{number}/{n}" for n in range(4))
        assert known.hold_new(names, [M] * 4, lease)
        match number % 3:
            case 0:
                known.settled_bulk(known.bulk_of(lease, names), CLIENT, source, range(4))
            case 1:
                known.settled_bulk(known.bulk_of(lease, names), CLIENT, source, range(4))
                known.settled(names[3], CLIENT)  # a repeated call
            case _:
                known.find(names[2])
                known.settled_all(names, CLIENT, source, range(4))
        ended = known.entries.keys() - set(standing)
        assert ended >= set(names)
        assert len(ended) == known._ended <= 10
        assert len(known._over) <= 10
    for _ in range(60):
        known.stand("comes and goes", Held(lease, M))
        known.voided("comes and goes", CLIENT)
        assert len(known._over) <= 10
    known.stand("comes and goes", Held(lease, M))
    for number in range(60):
        known.voided(f"another/{number}", CLIENT)
    assert known.find("comes and goes") == Held(lease, M)

    assert [known.find(name) for name in standing] == [Held(lease, M)] * 3
