"""The local ClickHouse's look at clients whose queries run."""

import socket

import pytest

from meterline.local.clickhouse.watcher import CANCEL_PACKET, peek


@pytest.fixture
def ends():
    client, server = socket.socketpair()
    yield client, server
    client.close()
    server.close()


def test_a_silent_client_is_there_and_waited_for_by_nobody(ends):
    """All clients' queries would wait with it."""
    _, server = ends
    server.settimeout(None)

    assert peek(server) is None


def test_a_cancel_stays_for_the_one_who_reads(ends):
    client, server = ends
    client.sendall(CANCEL_PACKET)

    assert peek(server) == CANCEL_PACKET
    assert server.recv(1) == CANCEL_PACKET


def test_a_client_that_left_is_gone(ends):
    client, server = ends
    client.close()

    assert peek(server) == b""
