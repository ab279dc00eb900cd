"""Producer and quota bound together for a worker: reserve, do the work, publish, settle."""

from __future__ import annotations

from meterline.task.attempt import Task
from meterline.task.errors import SpoolCorrupt, SpoolFailed, SpoolFull
from meterline.task.fake import FakeMeter
from meterline.task.meter import Meter

__all__ = ["FakeMeter", "Meter", "SpoolCorrupt", "SpoolFailed", "SpoolFull", "Task"]
