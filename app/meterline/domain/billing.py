"""When Stripe takes usage, and what a snapshot says that is new: limits of billing, without IO or clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b

from meterline.domain.encoding import canonical
from meterline.domain.usage_records import UsageRecord
from meterline.domain.windows import SkuTotal

__all__ = [
    "ABSENCE_MS",
    "FUTURE_MAX_MS",
    "INVOICE_GRACE_MS",
    "INVOICE_GRACE_MS_MAX",
    "INVOICE_MARGIN_MS",
    "PAST_MAX_MS",
    "RESEND_MAX_MS",
    "UNPROMPTED_ABSENCE_MS",
    "Known",
    "Verdict",
    "amounts_digest",
    "changes_of",
    "event_timestamp",
    "invoice_closes_at",
    "invoice_takes",
    "judge",
    "reason_not_to_send",
]

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

INVOICE_GRACE_MS = HOUR_MS
"""Stripe finalises an invoice one hour after its period ended, unless the account is set to wait longer."""
INVOICE_GRACE_MS_MAX = 72 * HOUR_MS
"""The longest it can be set to."""
INVOICE_MARGIN_MS = 10 * MINUTE_MS
"""No attempt this shortly before an invoice is final: for clocks that differ and requests on their way."""
PAST_MAX_MS = 34 * DAY_MS
"""Stripe refuses timestamps more than 35 days old; the day between leaves room for 23 hours of retries."""
FUTURE_MAX_MS = 4 * MINUTE_MS
"""Stripe refuses timestamps more than 5 minutes ahead; the minute between is for clocks that differ."""
RESEND_MAX_MS = 23 * HOUR_MS
"""Stripe remembers an identifier for at least 24 hours; after 23 an unknown outcome stays unknown."""


ABSENCE_MS = 6 * HOUR_MS
"""Summaries are eventually consistent, with no published delay: what was attempted longer ago and is not in
one is missing."""
UNPROMPTED_ABSENCE_MS = DAY_MS
"""The same where nothing else says that something is wrong: no unknown outcome, no notice."""


class Verdict(Enum):
    """How a snapshot stands to what is known of its window."""

    NEWER = "newer"
    OLDER = "older"
    REPEATED = "repeated"
    CONTRADICTED = "contradicted"
    """The same cutoff with other amounts: one of the two is not a function of the log."""


@dataclass(frozen=True, slots=True)
class Known:
    """The last snapshot of a window that was valued.

    Attributes:
        amounts: digest of its counts and credits.
        meters: micro-credits by meter.
    """

    cutoff_offset: int
    amounts: str
    meters: Mapping[str, int] = field(default_factory=dict)


def judge(known: Known | None, cutoff_offset: int, amounts: str) -> Verdict:
    """Whether a snapshot says something new."""
    if known is None or cutoff_offset > known.cutoff_offset:
        return Verdict.NEWER
    if cutoff_offset < known.cutoff_offset:
        return Verdict.OLDER
    return Verdict.REPEATED if amounts == known.amounts else Verdict.CONTRADICTED


def amounts_digest(skus: Mapping[str, SkuTotal]) -> str:
    """64 bits over counts and credits: what two snapshots of one cutoff must agree in."""
    fields: list[str | int] = []
    for sku in sorted(skus):
        total = skus[sku]
        fields += [sku, total.count, total.credits_micro, total.free_count, total.free_credits_micro]
    return blake2b(canonical("meterline.amounts.1", *fields), digest_size=8).hexdigest()


def changes_of(known: Known | None, meters: Mapping[str, int]) -> dict[str, int]:
    """Micro-credits by meter that a newer snapshot adds to what is known of its window.

    A meter the window no longer uses falls back to zero. A change of zero is a change: its row in the ledger
    is how a rebuilt state knows that this snapshot was accounted for.
    """
    before = known.meters if known else {}
    return {meter: meters.get(meter, 0) - before.get(meter, 0) for meter in sorted({*before, *meters})}


def invoice_closes_at(period_end: int, grace_ms: int = INVOICE_GRACE_MS) -> int:
    """From when on nothing is sent for a period: the margin before Stripe finalises its invoice."""
    return period_end + grace_ms - INVOICE_MARGIN_MS


def invoice_takes(period_end: int, now_ms: int, grace_ms: int = INVOICE_GRACE_MS) -> bool:
    """Whether usage sent now still reaches the invoice of a period."""
    return now_ms < invoice_closes_at(period_end, grace_ms)


def event_timestamp(
    window_start: int, window_end: int, period_start: int, period_end: int, now_ms: int
) -> int:
    """The second a usage record carries: inside its period, and inside its window wherever Stripe allows.

    The middle of the window, because Stripe's texts contradict each other on whether an edge belongs to a
    bucket. Usage that was moved to a later period, or is too old for Stripe, is dated now.
    """
    middle = window_start + (window_end - window_start) // 2
    inside = period_start <= middle < period_end and middle >= now_ms - PAST_MAX_MS
    wanted = min(middle, now_ms + FUTURE_MAX_MS) if inside else now_ms
    seconds = max(min(wanted, period_end - 1), period_start) // 1000
    if seconds % 60 == 0 and (seconds + 1) * 1000 < (window_end if inside else period_end):
        return seconds + 1
    return seconds


def reason_not_to_send(record: UsageRecord, now_ms: int, grace_ms: int = INVOICE_GRACE_MS) -> str:
    """Why this record must not be attempted any more; empty when it may be.

    `unknown_outcome`: Stripe may have forgotten the identifier, a resend could be counted twice.
    `invoice_final`: the invoice of its period no longer takes it. `too_old`: Stripe no longer takes its date.
    """
    if record.first_attempt_at is not None and now_ms - record.first_attempt_at >= RESEND_MAX_MS:
        return "unknown_outcome"
    if not invoice_takes(record.period_end, now_ms, grace_ms):
        return "invoice_final"
    if record.first_attempt_at is None and record.event_timestamp * 1000 < now_ms - PAST_MAX_MS:
        return "too_old"
    return ""
