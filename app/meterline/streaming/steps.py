"""Named steps: the points at which a crash must be harmless.

The code announces each step it reaches; nobody listens in production. Crash tests install an observer that
kills the process exactly there. A step without a crash test makes the suite fail.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

__all__ = ["Step", "observe", "reached"]


class Step(StrEnum):
    """Every announced step, in the order in which a partition passes through them."""

    OWNER_FENCED = "owner.fenced"
    """The previous owner can no longer commit; the changelog isn't read yet."""
    STATE_READ = "state.read"
    """The committed state is in memory; nothing was checked or delivered yet."""
    STATE_RESTORED = "state.restored"
    """The owner is ready; the first record comes next."""
    FLUSH_BUILT = "flush.built"
    """What will be written is decided; nothing is written."""
    ROWS_INSERTED = "rows.inserted"
    """ClickHouse acknowledged the rows; the transaction hasn't begun."""
    TRANSACTION_BEGUN = "transaction.begun"
    TRANSACTION_PRODUCED = "transaction.produced"
    """Every record of the transaction is acknowledged; it isn't committed."""
    TRANSACTION_COMMITTED = "transaction.committed"
    """The broker has it; memory doesn't know yet."""
    COMMIT_APPLIED = "commit.applied"
    INTENT_IN_LEDGER = "intent.in_ledger"
    """Billing: the intents are committed and their rows are in the ledger; nothing was sent."""
    ATTEMPT_IN_LEDGER = "attempt.in_ledger"
    """Billing: the attempt is durable; the first byte goes out next."""
    STRIPE_ANSWERED = "stripe.answered"
    """Billing: Stripe answered; the outcome isn't committed."""


_observer: Callable[[Step], None] | None = None


def observe(observer: Callable[[Step], None] | None) -> None:
    """Install the one observer of this process, or remove it."""
    global _observer  # noqa: PLW0603 - one process, one observer; tests only
    _observer = observer


def reached(step: Step) -> None:
    """Announce a step."""
    if _observer is not None:
        _observer(step)
