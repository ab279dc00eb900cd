"""A worker's free memory: kept between flushes, given back at last."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")

SCRIPT = """
import threading
import psutil
from meterline.streaming.memory import give_back_memory, keep_memory

def resident_mib():
    return psutil.Process().memory_info().rss >> 20

def flush():
    blocks = [b"x" * 100_000 for _ in range(500)]
    most.append(resident_mib())

keep_memory()
before, most = resident_mib(), []
flush()
thread = threading.Thread(target=flush)
thread.start()
thread.join()
kept = resident_mib()
give_back_memory()
print(before, *most, kept, resident_mib())
"""
"""A process of its own: what is set for its memory stays so. 50 MB come and go, then again in a thread."""


def test_free_memory_is_kept_for_the_next_flush_in_any_thread_and_given_back_in_the_end():
    """Given back at once it costs a fast worker a sixth of its time; never, one backlog's lasts for ever."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, first, second, kept, given_back = map(int, done.stdout.split())

    assert first - before > 45
    assert second - first < 5
    assert first - kept < 5
    assert given_back - before < 5
