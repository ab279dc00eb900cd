"""What a worker's consumer asks of the broker."""

import asyncio
from types import SimpleNamespace

from faust.transport.drivers import aiokafka as driver

from meterline.streaming.consumer import TRICKLE_BYTES, TRICKLE_WAIT_MS, CommittedChunksThread

QUIET = 1_500, 1
RECORD = SimpleNamespace(offset=0)
TRICKLE = TRICKLE_WAIT_MS, TRICKLE_BYTES


def test_the_broker_gathers_while_records_come_and_tells_the_first_one_at_once(monkeypatch):
    """Many small answers would cost more than their records; a quiet topic is asked as Faust asks it."""
    answers = [{}, {"tp": [RECORD]}, {"tp": [RECORD]}, {}, {}, {"tp": [RECORD]}]
    fetcher = SimpleNamespace(_fetch_max_wait_ms=QUIET[0], _fetch_min_bytes=QUIET[1])
    consumer = SimpleNamespace(_fetcher=fetcher, _fetch_max_wait_ms=QUIET[0], _fetch_min_bytes=QUIET[1])
    consumer._isolation_level = "read_uncommitted"
    asked = []

    async def fetched(*_):
        return answers.pop(0)

    thread_class = driver.AIOKafkaConsumerThread
    monkeypatch.setattr(thread_class, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(thread_class, "_create_worker_consumer", lambda *_: consumer)
    monkeypatch.setattr(thread_class, "_fetch_records", fetched)
    monkeypatch.setattr(CommittedChunksThread, "_current_assignment", staticmethod(lambda _: None))
    monkeypatch.setattr("meterline.streaming.consumer.split_into_chunks", lambda *_: ())

    async def run():
        thread = CommittedChunksThread()
        thread._create_worker_consumer(None)
        while answers:
            await thread._fetch_records(consumer, ())
            asked.append((fetcher._fetch_max_wait_ms, fetcher._fetch_min_bytes))

    asyncio.run(run())

    assert asked == [QUIET, TRICKLE, TRICKLE, QUIET, QUIET, TRICKLE]
