"""What gives a client credits: prepaid grants, budgets for each period, and the base a period began with.

All three are facts on one log. What a bucket was given is a fold over them in the order of the log, the same
live and in a rebuild.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from meterline.domain.buckets import BUCKET_MICRO_MAX
from meterline.domain.encoding import hash_hex
from meterline.domain.events import ID_BYTES_MAX

__all__ = [
    "BaselinePart",
    "ClientGrants",
    "CreditGrant",
    "GrantKind",
    "GrantOutcome",
    "baseline_id",
    "check_grant",
]


class GrantKind(StrEnum):
    """What a grant does."""

    PREPAID = "prepaid"
    """That much more, until it is used."""
    BUDGET = "budget"
    """That much in each billing period from `period_start` on, until a later budget."""
    BASELINE = "baseline"
    """A billing period begins, with these totals as its base."""


class GrantOutcome(StrEnum):
    """What a record of the log did. The words are stored in the ledger."""

    APPLIED = "applied"
    KNOWN = "known"
    """A copy: the same grant id came before."""
    OLDER_PERIOD = "older_period"
    """A baseline of a period that began already, or of an earlier one: the first in the log won."""


@dataclass(frozen=True, slots=True)
class BaselinePart:
    """One client's lifetime total from one source partition when the period began."""

    topic_id: str
    partition: int
    cutoff_offset: int
    credits_micro: int


@dataclass(frozen=True, slots=True)
class CreditGrant:
    """One grant. Times are milliseconds since the epoch, UTC.

    Attributes:
        period_start: of a budget the first period it is for; of a baseline the period that begins.
        period_end: of a baseline.
        base: of a baseline, one part for each source partition; their sum is not charged to the period.
        granted_by: a person or a program.
        reason: e.g. the number of the paid invoice.
    """

    grant_id: str
    client_id: str
    kind: GrantKind
    credits_micro: int
    granted_at: int
    granted_by: str
    reason: str = ""
    period_start: int | None = None
    period_end: int | None = None
    base: tuple[BaselinePart, ...] = ()

    @property
    def base_micro(self) -> int:
        """Sum of the base, micro-credits."""
        return sum(part.credits_micro for part in self.base)


def baseline_id(client_id: str, period_start: int) -> str:
    """The grant id of a baseline: whoever begins the period, it is the same one."""
    return f"baseline-{hash_hex('meterline.baseline.1', client_id, period_start)}"


def check_grant(grant: CreditGrant) -> None:
    """The rules a grant must meet.

    Raises:
        ValueError: says which field is wrong.
    """
    for name, value in (("grant_id", grant.grant_id), ("client_id", grant.client_id)):
        if not 1 <= len(value.encode()) <= ID_BYTES_MAX:
            raise ValueError(f"{name} must have 1 to {ID_BYTES_MAX} bytes")
    smallest = 1 if grant.kind is GrantKind.PREPAID else 0
    if not smallest <= grant.credits_micro <= BUCKET_MICRO_MAX:
        raise ValueError(
            f"a {grant.kind} grant must have {smallest} to {BUCKET_MICRO_MAX} micro-credits, "
            f"not {grant.credits_micro}"
        )
    if (grant.period_start is None) != (grant.kind is GrantKind.PREPAID):
        raise ValueError("period_start belongs to a budget and to a baseline, and only to them")
    if (grant.period_end is None) == (grant.kind is GrantKind.BASELINE):
        raise ValueError("period_end belongs to a baseline, and only to it")
    if grant.base and grant.kind is not GrantKind.BASELINE:
        raise ValueError("only a baseline has a base")


@dataclass(slots=True)
class ClientGrants:
    """What one client was given: a fold over its records, in the order of the log.

    Attributes:
        baseline: of the newest period; None: no period began yet.
        extras: prepaid grants since then (without a baseline: all).
        budgets: those that may still rule a period.
    """

    baseline: CreditGrant | None = None
    extras: list[CreditGrant] = field(default_factory=list)
    budgets: list[CreditGrant] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)
    """Ids of prepaid grants and budgets. Baselines are known by their period: they come each day."""

    def take(self, grant: CreditGrant) -> GrantOutcome:
        """Fold in the next record."""
        if grant.grant_id in self._known:
            return GrantOutcome.KNOWN
        if grant.kind is GrantKind.BASELINE:
            return self._begin(grant)
        self._known.add(grant.grant_id)
        if grant.kind is GrantKind.PREPAID:
            self.extras.append(grant)
        else:
            self.budgets.append(grant)
        return GrantOutcome.APPLIED

    def _begin(self, baseline: CreditGrant) -> GrantOutcome:
        start = _start(baseline)
        if self.baseline is not None and start <= _start(self.baseline):
            known = baseline.grant_id == self.baseline.grant_id
            return GrantOutcome.KNOWN if known else GrantOutcome.OLDER_PERIOD
        self.baseline = baseline
        self.extras.clear()  # an extra is one for its own period
        ruling = self.budget_for(start)
        if ruling is not None:
            self.budgets = [b for b in self.budgets if b is ruling or _start(b) > start]
        return GrantOutcome.APPLIED

    def budget_for(self, period_start: int) -> CreditGrant | None:
        """The budget of a period: of those from it or before, the latest; of equals, the last in the log."""
        due = [budget for budget in self.budgets if _start(budget) <= period_start]
        return max(reversed(due), key=_start) if due else None

    def standing(self) -> list[CreditGrant]:
        """The records an empty bucket needs to become what this client's is, in order."""
        return [*([] if self.baseline is None else [self.baseline]), *self.extras]


def _start(grant: CreditGrant) -> int:
    assert grant.period_start is not None
    return grant.period_start
