"""The ledger's tables and their columns, in the order in which rows are inserted."""

from __future__ import annotations

__all__ = [
    "BILLING_ORDER_LOG",
    "BILLING_ORDER_LOG_COLUMNS",
    "CREDIT_GRANT_LOG",
    "CREDIT_GRANT_LOG_COLUMNS",
    "EVENTS",
    "EVENT_COLUMNS",
    "QUOTA_CHANGE_LOG",
    "QUOTA_CHANGE_LOG_COLUMNS",
    "REPAIR_LOG",
    "REPAIR_LOG_COLUMNS",
    "USAGE_RECORD_LOG",
    "USAGE_RECORD_LOG_COLUMNS",
    "WINDOW_SNAPSHOTS",
    "WINDOW_SNAPSHOT_COLUMNS",
]

EVENTS = "events"
EVENT_COLUMNS = (
    "topic_id",
    "partition",
    "offset",
    "appended_at",
    "event_id",
    "client_id",
    "correlation_id",
    "sku",
    "credits_micro",
    "occurred_at",
    "source",
    "attributes",
    "reservation_id",
    "billable",
    "corrects_event_id",
    "corrects_kind",
    "corrects_topic_id",
    "corrects_partition",
    "corrects_offset",
    "identity_hash",
    "payload_digest",
)
"""From `event_id` to `billable` as in the schema. Times are int milliseconds; `attributes` a dict;
`reservation_id` a str or None; no correction: '', 0."""

WINDOW_SNAPSHOTS = "window_snapshots"
WINDOW_SNAPSHOT_COLUMNS = (
    "window_id",
    "client_id",
    "window_start",
    "window_end",
    "topic_id",
    "partition",
    "cutoff_offset",
    "skus",
    "counts",
    "credits_micro",
    "free_counts",
    "free_credits_micro",
    "closed_at",
    "watermark",
    "log_topic_id",
    "log_partition",
    "log_offset",
)
"""Times are int milliseconds; the columns from `skus` to `free_credits_micro` hold lists of equal length."""

USAGE_RECORD_LOG = "usage_record_log"
USAGE_RECORD_LOG_COLUMNS = (
    "log_id",
    "partition",
    "seq",
    "generation",
    "recorded_at",
    "kind",
    "client_id",
    "meter",
    "map_version",
    "period_start",
    "period_end",
    "window_id",
    "window_start",
    "window_end",
    "source_topic_id",
    "source_partition",
    "cutoff_offset",
    "credits_micro",
    "identifier",
    "event_name",
    "stripe_customer",
    "value",
    "event_timestamp",
    "idempotency_key",
    "state",
    "reason",
    "first_attempt_at",
    "request_id",
    "detail",
)
"""Times are int milliseconds, except `event_timestamp`: Stripe's own unit, int seconds."""

CREDIT_GRANT_LOG = "credit_grant_log"
CREDIT_GRANT_LOG_COLUMNS = (
    "log_id",
    "partition",
    "offset",
    "appended_at",
    "grant_id",
    "client_id",
    "kind",
    "credits_micro",
    "period_start",
    "period_end",
    "base_topic_ids",
    "base_partitions",
    "base_cutoff_offsets",
    "base_credits_micro",
    "granted_at",
    "granted_by",
    "reason",
    "outcome",
)
"""Times are int milliseconds, 0 for none; the columns from `base_topic_ids` to `base_credits_micro` hold
lists of equal length."""

QUOTA_CHANGE_LOG = "quota_change_log"
QUOTA_CHANGE_LOG_COLUMNS = (
    "change_id",
    "changed_at",
    "action",
    "client_id",
    "grant_id",
    "reservation_id",
    "credits_micro",
    "changed_by",
    "reason",
    "detail",
)
"""Times are int milliseconds; no client, grant or reservation: ''."""

REPAIR_LOG = "repair_log"
REPAIR_LOG_COLUMNS = (
    "repair_id",
    "ordered_at",
    "action",
    "topic_id",
    "partition",
    "first_offset",
    "last_offset",
    "changed_by",
    "reason",
    "detail",
)
"""Times are int milliseconds."""

BILLING_ORDER_LOG = "billing_order_log"
BILLING_ORDER_LOG_COLUMNS = (
    "order_id",
    "ordered_at",
    "action",
    "client_id",
    "target",
    "value",
    "ordered_by",
    "reason",
)
"""Times are int milliseconds; all clients, or no target: ''."""
