"""What a worker's consumer asks of the broker."""

import asyncio
from types import SimpleNamespace

import pytest
from faust.transport.drivers import aiokafka as driver
from tests.simulation.lone_process import LoneProcess

from meterline.streaming.consumer import STEADY_S, TRICKLE_BYTES, TRICKLE_WAIT_MS, CommittedChunksThread

QUIET = 1_500, 1
STEADY = TRICKLE_WAIT_MS, TRICKLE_BYTES
TIMEOUT_S = 1.0
RECORDS = {"tp": [SimpleNamespace(offset=0)]}


@pytest.fixture
def asked(monkeypatch):
    """Answers, each with the seconds until it comes -> how each fetch is asked for, and how patiently."""
    fetcher = SimpleNamespace(_fetch_max_wait_ms=QUIET[0], _fetch_min_bytes=QUIET[1])
    consumer = SimpleNamespace(
        _fetcher=fetcher,
        _fetch_max_wait_ms=QUIET[0],
        _fetch_min_bytes=QUIET[1],
        _isolation_level="read_uncommitted",
    )
    answers, fetches = [], []

    async def fetched(_thread, _consumer, _partitions, patience_s, _max_records):
        fetches.append((fetcher._fetch_max_wait_ms, fetcher._fetch_min_bytes, patience_s))
        seconds, answer = answers.pop(0)
        await asyncio.sleep(seconds)
        return answer

    async def run():
        thread = CommittedChunksThread(SimpleNamespace(transport=None))
        thread._create_worker_consumer(None)
        while answers:
            await thread._fetch_records(consumer, (), TIMEOUT_S)

    def ask(*expected):
        answers.extend(expected)
        with LoneProcess() as alone:
            alone.run(run())
        return fetches

    thread_class = driver.AIOKafkaConsumerThread
    monkeypatch.setattr(thread_class, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(thread_class, "_create_worker_consumer", lambda *_: consumer)
    monkeypatch.setattr(thread_class, "_fetch_records", fetched)
    monkeypatch.setattr(CommittedChunksThread, "_current_assignment", staticmethod(lambda _: None))
    monkeypatch.setattr("meterline.streaming.consumer.split_into_chunks", lambda *_: ())
    return ask


def test_the_broker_gathers_while_records_come_steadily(asked):
    """Many small answers would cost more than their records. When no more come, that is noticed soon."""
    fetches = asked((1.0, RECORDS), (0.002, RECORDS), (0.03, RECORDS), (STEADY_S, {}), (TIMEOUT_S, {}))

    assert fetches == [
        (*QUIET, TIMEOUT_S),
        (*QUIET, TIMEOUT_S),
        (*STEADY, STEADY_S),
        (*STEADY, STEADY_S),
        (*QUIET, TIMEOUT_S),
    ]


def test_of_a_slow_topic_each_record_is_told_at_once(asked):
    """And nobody asks in vain between two of them."""
    assert asked(*[(2 * STEADY_S, RECORDS)] * 4) == [(*QUIET, TIMEOUT_S)] * 4
