"""The one way out when the outcome of a commit is unknown, or no work can come: end the process at once."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from meterline.logs import get_logger
from meterline.metrics import FATAL_EXITS

__all__ = ["EXIT_FENCED_OR_UNKNOWN", "die", "remember_exits"]

EXIT_FENCED_OR_UNKNOWN = 9
"""Exit status that asks the supervisor for a restart: the committed state says what happened."""

log = get_logger(__name__)

_exits_file: Path | None = None


def remember_exits(folder: Path) -> None:
    """Count the ends of earlier processes of this folder; this one's will be noted there, too.

    A metric of a process that ends at once would never be read.
    """
    global _exits_file  # noqa: PLW0603 - one process, one end
    _exits_file = folder / "fatal-exits"
    with suppress(OSError):  # a folder that can't be written costs a metric, not the work
        folder.mkdir(parents=True, exist_ok=True)
        _exits_file.touch()
        FATAL_EXITS.inc(_exits_file.stat().st_size)


def die(why: str, error: BaseException | None = None) -> NoReturn:
    """End the process without any further step.

    A graceful stop would go through Faust's shutdown, which flushes and commits; after a fenced or unknown
    transaction that could only do harm. A restart takes a few seconds and reads the committed state.
    """
    log.critical("worker must exit", why=why, error=repr(error) if error else None, exc_info=error)
    logging.shutdown()
    if _exits_file is not None:
        with suppress(OSError), _exits_file.open("ab") as exits:
            exits.write(b"9")
    os._exit(EXIT_FENCED_OR_UNKNOWN)
