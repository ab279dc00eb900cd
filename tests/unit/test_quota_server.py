"""What a server says of itself when the library connects."""

from __future__ import annotations

import asyncio

import pytest
from redis._parsers import BaseParser

from meterline.errors import UserError
from meterline.quota import server as server_module
from meterline.quota.availability import Unreachable
from meterline.quota.scripts import is_passing


@pytest.mark.parametrize(
    ("loading", "expected", "text"), [("1", Unreachable, "loading"), ("0", UserError, "append-only")]
)
def test_a_server_that_still_loads_is_away_and_not_unsafe(monkeypatch, loading, expected, text):
    """While it reads its append-only file it says that it keeps none: a restart must not end a worker."""

    class Connection:
        async def connect(self):
            pass

        async def disconnect(self, *, nowait):
            assert nowait

    async def info(_connection, _section):
        server = {"redis_version": "9.1.2", "arch_bits": "64", "run_id": "a" * 40}
        return server | {"loading": loading, "aof_enabled": "0"}

    monkeypatch.setattr(server_module, "_info", info)
    asked = server_module.Server.__new__(server_module.Server)
    monkeypatch.setattr(server_module.Server, "new_connection", lambda _: Connection())

    with pytest.raises(expected, match=text):
        asyncio.run(asked.look(1.0))


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", True),
        ("READONLY You can't write against a read only replica.", True),
        ("BUSY Redis is busy running a script.", True),
        ("MASTERDOWN Link with MASTER is down.", True),
        ("ERR unknown command", False),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False),
    ],
)
def test_a_server_in_trouble_is_told_from_a_wrong_operation(answer, passes):
    """As redis-py hands it on, which cuts some codes off. A full server leads to the policy, not to blame."""
    assert passes == is_passing(BaseParser.parse_error(answer))
