"""How a worker is put together: what the settings decide, and what runs beside the agent."""

from __future__ import annotations

import asyncio
import resource

import pytest

from meterline.errors import UserError
from meterline.metering import worker
from meterline.settings import Settings
from meterline.streaming import app as streaming_app
from meterline.streaming.memory import GIVE_BACK_INTERVAL_S


@pytest.fixture
def metering_app(monkeypatch):
    """Makes the app of a metering worker, with some settings; aiokafka stays as it is."""
    monkeypatch.setattr(streaming_app, "keep_batches_whole", lambda *_: None)
    monkeypatch.setattr(streaming_app, "read_whole_answers", lambda: None)

    def make(**metering):
        settings = Settings()
        changed = settings.metering.model_copy(update=metering)
        return worker.create_app(settings.model_copy(update={"metering": changed}))

    return make


@pytest.mark.parametrize(
    ("setting", "is_fast", "pending_max"),
    [
        (None, False, worker.PENDING_EVENTS_PLAIN),
        (None, True, worker.PENDING_EVENTS_FAST),
        (5_000, False, 5_000),
        (5_000, True, 5_000),
    ],
)
def test_the_fast_path_lets_more_events_wait_unless_the_settings_say_how_many(
    metering_app, setting, is_fast, pending_max
):
    """An event that waits takes a third of the memory there."""
    if is_fast:
        pytest.importorskip("numba", reason="the extra `fast` is not installed")
    limits = metering_app(pending_events_max=setting, fast_path=is_fast).plan.limits

    assert limits.pending_max == pending_max


def test_free_memory_goes_back_to_the_system_now_and_then(metering_app, monkeypatch):
    """Otherwise one backlog would last for ever."""
    given_back, intervals = [], []
    monkeypatch.setattr(streaming_app, "give_back_memory", lambda: given_back.append(True))
    app = metering_app(fast_path=False)

    async def three_times(interval, **_):
        intervals.append(interval)
        for _ in range(3):
            yield interval

    monkeypatch.setattr(app, "itertimer", three_times)
    (timer,) = [task for task in app._app_tasks if task.__name__ == "give_back"]
    asyncio.run(timer())

    assert intervals == [GIVE_BACK_INTERVAL_S]
    assert len(given_back) == 3


def test_a_worker_may_open_as_many_files_as_its_user_may(metering_app, monkeypatch):
    """Each slice of an index keeps one open: with many partitions more than a process may at first."""

    def no_topic(*_):
        raise UserError("no such topic")

    monkeypatch.setattr(streaming_app, "partition_counts", no_topic)
    monkeypatch.setattr(streaming_app, "keep_memory", lambda: None)
    monkeypatch.setattr(streaming_app, "configure_logs", lambda _: None)
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most // 2, most))
    try:
        with pytest.raises(UserError):
            streaming_app.run_worker(metering_app(fast_path=False))

        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
