"""`python -m meterline.metering.fast`: compile the kernels, so that the first worker need not wait for it."""

from __future__ import annotations

from meterline.metering.fast import load_fast_path

if (fast := load_fast_path()) is not None:
    fast.warm_up()
