"""Grants and baselines as rows of the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meterline.domain.grants import CreditGrant, GrantOutcome

__all__ = ["GrantRow", "grant_columns"]


@dataclass(frozen=True, slots=True)
class GrantRow:
    """One record of credit.grants and what it did: a function of the log up to it."""

    partition: int
    offset: int
    appended_at: int
    grant: CreditGrant
    outcome: GrantOutcome


def grant_columns(log_id: str, rows: Sequence[GrantRow]) -> list[list[Any]]:
    """The columns of `CREDIT_GRANT_LOG_COLUMNS`.

    Args:
        log_id: topic id of credit.grants.
        rows: in any order.
    """
    lines = [
        (
            log_id,
            row.partition,
            row.offset,
            row.appended_at,
            row.grant.grant_id,
            row.grant.client_id,
            row.grant.kind.value,
            row.grant.credits_micro,
            row.grant.period_start or 0,
            row.grant.period_end or 0,
            [part.topic_id for part in row.grant.base],
            [part.partition for part in row.grant.base],
            [part.cutoff_offset for part in row.grant.base],
            [part.credits_micro for part in row.grant.base],
            row.grant.granted_at,
            row.grant.granted_by,
            row.grant.reason,
            row.outcome.value,
        )
        for row in rows
    ]
    return [list(column) for column in zip(*lines, strict=True)]
