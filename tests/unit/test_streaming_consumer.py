"""How often a worker's consumer takes what was fetched."""

import asyncio

import pytest
from faust.transport.drivers import aiokafka as driver
from tests.simulation.lone_process import LoneProcess

from meterline.streaming.consumer import FETCH_INTERVAL_S, CommittedChunksThread


@pytest.mark.parametrize(
    ("work_s", "taken_at"),
    [
        (0.0, [0.0, FETCH_INTERVAL_S, 2 * FETCH_INTERVAL_S]),
        (FETCH_INTERVAL_S / 2, [0.0, FETCH_INTERVAL_S, 2 * FETCH_INTERVAL_S]),
        (1.0, [0.0, 1.0, 2.0]),
    ],
)
def test_a_trickle_is_taken_at_intervals_and_a_backlog_at_once(monkeypatch, work_s, taken_at):
    """Between two fetches a worker is busy with the first one for so long."""
    taken = []

    async def fetched(*_):
        taken.append(asyncio.get_running_loop().time())
        return {}

    monkeypatch.setattr(driver.AIOKafkaConsumerThread, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(driver.AIOKafkaConsumerThread, "_fetch_records", fetched)
    monkeypatch.setattr(CommittedChunksThread, "_current_assignment", staticmethod(lambda _: None))

    async def work():
        thread = CommittedChunksThread()
        for _ in taken_at:
            await thread._fetch_records(None, ())
            await asyncio.sleep(work_s)

    with LoneProcess() as alone:
        alone.run(work())

    assert taken == pytest.approx(taken_at)
