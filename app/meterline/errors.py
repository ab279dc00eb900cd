"""Errors decide the route of the work that raised them.

MeterlineError
├── UserError            a person's mistake: say what to do, exit 2, no traceback
├── RetryLater           a dependency is away or busy: the same work again, later
├── DeadLetterError      this record can never be accepted: its bytes go to the dead-letter topic
└── StopError            going on could lose or double money
    ├── PartitionHalted  this partition stops, the others go on
    └── WorkerMustExit   the process ends; a restart reads the committed state and goes on
"""

from __future__ import annotations

__all__ = [
    "DeadLetterError",
    "MeterlineError",
    "PartitionHalted",
    "RetryLater",
    "StopError",
    "UserError",
    "WorkerMustExit",
]


class MeterlineError(Exception):
    """Everything Meterline raises on purpose."""


class UserError(MeterlineError):
    """A wrong setting, argument or input. The text says what is wrong and what to do."""


class RetryLater(MeterlineError):  # noqa: N818 - named for the route it takes
    """A dependency did not answer or asked us to wait. Nothing was decided."""


class DeadLetterError(MeterlineError):
    """This record can never be accepted.

    Attributes:
        reason: the code from `meterline.domain.reasons.Reason`, stored with the record.
        detail: one sentence for the person who looks at the dead letter.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class StopError(MeterlineError):
    """Going on could lose or double money."""


class PartitionHalted(StopError):  # noqa: N818 - named for the route it takes
    """One partition must stop until somebody repairs it; the text names the exact range."""


class WorkerMustExit(StopError):  # noqa: N818 - named for the route it takes
    """The process must end: its view of the committed state can no longer be trusted."""
