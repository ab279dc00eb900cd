"""The brake on dead letters: many clients trip it, a few never do, and the log alone says where."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meterline.domain.brake import BRAKE_BLOCK_OFFSETS, Brake

MAX, CLIENTS = 100, 5


def brake(limit=MAX):
    return Brake(limit, CLIENTS)


def trips_at(refused, limit=MAX, restarts=()):
    """Offset of the dead letter that trips it, None if none does; as a worker would that is restarted."""
    one = brake(limit)
    for offset, client in refused:
        one.count(offset, client, "undecodable")
        if one.flood:
            return offset
        if offset in restarts:
            data, one = one.to_bytes(), brake(limit)
            one.restore(data)
    return None


def test_one_more_than_the_limit_trips_it():
    """Each client has one dead letter, so that all of them count."""
    refused = [(offset, b"c%d" % offset) for offset in range(2 * MAX)]

    assert trips_at(refused) == MAX


def test_fewer_clients_than_many_never_trip_it():
    """Whatever else they send, they are fewer than a deployment's."""
    refused = [(offset, b"c%d" % (offset % (CLIENTS - 1))) for offset in range(5 * BRAKE_BLOCK_OFFSETS)]

    assert trips_at(refused) is None


def test_one_client_hides_behind_nobody():
    """It floods the log; single dead letters of others do not make it everybody's trouble."""
    refused = [
        (offset, b"c%d" % (offset % 60) if offset % 60 < 3 * CLIENTS and offset < 60 else b"bad")
        for offset in range(5 * BRAKE_BLOCK_OFFSETS)
    ]

    assert trips_at(refused) is None


def test_just_enough_clients_that_send_nothing_else_trip_it():
    """The share of a client is such that `clients_min` of them can."""
    refused = [(offset, b"c%d" % (offset % CLIENTS)) for offset in range(BRAKE_BLOCK_OFFSETS)]

    assert trips_at(refused) is not None


def test_a_steady_trickle_is_no_flood():
    """One record in twenty, each of another client: the next block begins at nothing."""
    assert trips_at([(offset, b"c%d" % offset) for offset in range(0, 100_000, 20)]) is None


def test_the_largest_setting_lets_everything_pass():
    """A block has no more dead letters than that: the operator's way to say so."""
    refused = [(offset, b"c%d" % offset) for offset in range(5 * BRAKE_BLOCK_OFFSETS)]

    assert trips_at(refused, limit=BRAKE_BLOCK_OFFSETS) is None


def test_the_text_names_the_range_the_clients_and_the_reasons():
    """Whoever is called at night sees what it is before reading a single record."""
    one = brake(2)
    for offset in range(1_010, 1_030):
        one.count(offset, b"c%d" % offset, "unknown_schema" if offset % 2 else "conflict")

    assert one.flood == (
        "5 of the records at offsets 1000..1014 are dead letters, of 5 clients (3 conflict, 2 unknown_schema)"
    )


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=80),
    st.sets(st.integers(0, 1_100)),
    st.integers(1, 12),
)
def test_a_restart_anywhere_changes_nothing(steps, restarts, limit):
    """The state is all it knows."""
    refused, offset = [], BRAKE_BLOCK_OFFSETS - 40
    for gap, client in steps:
        offset += 1 + gap
        refused.append((offset, b"c%d" % client))

    assert trips_at(refused, limit) == trips_at(refused, limit, restarts)
