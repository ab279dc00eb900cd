"""The order in which usage records are sent."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from meterline.billing.queue import SendQueue

LANES = [("cus_1", "credits"), ("cus_1", "tokens"), ("cus_2", "credits")]
lanes = st.sampled_from(LANES)


def push_all(queue, pushes):
    expected = defaultdict(list)
    for number, lane in enumerate(pushes):
        queue.push(lane, str(number))
        expected[lane].append(str(number))
    return expected


@given(st.lists(lanes, max_size=20), st.randoms(use_true_random=False))
def test_each_record_is_given_out_once_and_in_order_of_its_lane(pushes, random):
    """One at a time for a customer and meter, whatever order the answers come in."""
    queue, taken, under_way = SendQueue(), defaultdict(list), []
    expected = push_all(queue, pushes)
    while (one := queue.take(0)) is not None or under_way:
        if one is not None:
            lane, identifier = one
            assert lane not in under_way
            under_way.append(lane)
            taken[lane].append(identifier)
        if under_way and (one is None or random.random() < 0.5):
            queue.free(under_way.pop(random.randrange(len(under_way))))

    assert expected == taken


@given(st.lists(lanes, max_size=20))
def test_no_lane_waits_for_another(pushes):
    """As many requests at once as there are lanes; the longest-waiting lane first."""
    queue = SendQueue()
    push_all(queue, pushes)

    given_out = [queue.take(0)[0] for _ in set(pushes)]

    assert list(dict.fromkeys(pushes)) == given_out
    assert queue.take(0) is None


def test_a_record_that_waits_lets_the_others_of_its_lane_pass():
    """A refused try must not hold up what came after it."""
    queue = SendQueue()
    queue.push(LANES[0], "waits", 100)
    queue.push(LANES[0], "passes")

    assert queue.take(99) == (LANES[0], "passes")
    assert queue.take(100) is None, "its lane is busy"
    queue.free(LANES[0])
    assert queue.take(100) == (LANES[0], "waits")


@given(st.lists(st.tuples(lanes, st.integers(1, 50)), max_size=20))
def test_nothing_is_given_out_before_its_time(pushes):
    """And everything after it, in the order of the times."""
    queue, taken = SendQueue(), []
    for number, (lane, at) in enumerate(pushes):
        queue.push(lane, str(number), at)
    for now in range(51):
        while (one := queue.take(now)) is not None:
            queue.free(one[0])
            assert pushes[int(one[1])][1] == now
            taken.append(int(one[1]))

    assert sorted(taken) == list(range(len(pushes)))
