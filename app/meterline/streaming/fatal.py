"""The one way out when the outcome of a commit is unknown: end the process at once."""

from __future__ import annotations

import logging
import os
from typing import NoReturn

from meterline.logs import get_logger

__all__ = ["EXIT_FENCED_OR_UNKNOWN", "die"]

EXIT_FENCED_OR_UNKNOWN = 9
"""Exit status that asks the supervisor for a restart: the committed state says what happened."""

log = get_logger(__name__)


def die(why: str, error: BaseException | None = None) -> NoReturn:
    """End the process without any further step.

    A graceful stop would go through Faust's shutdown, which flushes and commits; after a fenced or unknown
    transaction that could only do harm. A restart takes a few seconds and reads the committed state.
    """
    log.critical("worker must exit", why=why, error=repr(error) if error else None, exc_info=error)
    logging.shutdown()
    os._exit(EXIT_FENCED_OR_UNKNOWN)
