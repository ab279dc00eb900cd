"""What a server says of itself when the library connects."""

from __future__ import annotations

import asyncio

import pytest

from meterline.errors import UserError
from meterline.quota import server as server_module
from meterline.quota.availability import Unreachable


@pytest.mark.parametrize(("loading", "expected"), [("1", Unreachable), ("0", UserError)])
def test_a_server_that_still_loads_is_away_and_not_unsafe(monkeypatch, loading, expected):
    """While it reads its append-only file it says that it keeps none: a restart must not end a worker."""

    class Connection:
        async def connect(self):
            pass

        async def disconnect(self, *, nowait):
            assert nowait

    async def info(_connection, _section):
        return {"redis_version": "9.1.2", "loading": loading, "aof_enabled": "0"}

    monkeypatch.setattr(server_module, "_info", info)
    asked = server_module.Server.__new__(server_module.Server)
    monkeypatch.setattr(server_module.Server, "new_connection", lambda _: Connection())

    with pytest.raises(expected):
        asyncio.run(asked.look(1.0))
