"""What a worker needs before it does anything, imported and compiled: see `worker_nursery`."""

from __future__ import annotations

from meterline.local.crash import WORKERS, main
from meterline.metering.fast import load_fast_path
from meterline.settings import load_settings
from meterline.streaming.app import run_worker

__all__ = ["WORKERS", "load_settings", "main", "run_worker"]

if (fast := load_fast_path()) is not None:
    fast.warm_up()
