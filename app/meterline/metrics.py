"""The catalogue of metrics: every name, its type and its meaning, in one place.

Base units (seconds, bytes), `_total` for counters, no client id as a label: there may be millions of them. A
gauge of a partition is removed when the worker loses it: two workers must not tell of one partition.
Tests hold the catalogue against the code that sets it and the page that explains it.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

__all__ = [
    "COMMITS",
    "CREDIT_ALERTS_RAISED",
    "DEAD_LETTERS",
    "DEDUPE_IDS",
    "EVENTS_TAKEN",
    "FATAL_EXITS",
    "FLUSH_STEP_SECONDS",
    "INVOICE_CLOSES_SECONDS",
    "LAG_OFFSETS",
    "LATE_EVENTS",
    "OLDEST_WINDOW_SECONDS",
    "PARTITION_HALTED",
    "PENDING_EVENTS",
    "QUOTA_BREAKER_OPEN",
    "QUOTA_CALL_SECONDS",
    "QUOTA_DECISIONS",
    "QUOTA_GENERATIONS",
    "QUOTA_HOLDS_EXPIRED",
    "QUOTA_LOG_CLOCK_SECONDS",
    "QUOTA_OPEN",
    "QUOTA_PERIODS_BEGUN",
    "QUOTA_TOTALS",
    "QUOTA_UNCOVERED_MICRO",
    "SPOOL_REFUSED",
    "SPOOL_WAITING_BYTES",
    "STRIPE_REQUESTS",
    "STRIPE_SENDING_STOPPED",
    "USAGE_RECORDS_HELD",
    "WATERMARK_AGE_SECONDS",
    "WATERMARK_SECONDS",
    "WEBHOOK_POSTS",
    "WINDOWS_CONTRADICTED",
    "WINDOWS_OPEN",
    "WINDOWS_PUBLISHED",
]

# -- metering: what became of records. Counted when the broker has their flush: a repeated one counts once

EVENTS_TAKEN = Counter(
    "meterline_events",
    "Records of usage.events by what became of them: accepted, duplicate, dead_letter.",
    ["disposition"],
)
# Conflicts among them: a producer that gives two tasks one id. Their first one is billed, the second is not.
DEAD_LETTERS = Counter("meterline_dead_letters", "Dead letters by reason code, conflicts too.", ["reason"])
# Each late event means a second snapshot; reopened ones a question to the ledger, too, for which their
# partition waits.
LATE_EVENTS = Counter(
    "meterline_late_events",
    "Accepted events that came after their window was closed: kept in memory, or reopened from the ledger.",
    ["disposition"],
)

# -- metering: where partitions stand

WATERMARK_SECONDS = Gauge(
    "meterline_watermark_timestamp_seconds", "Event time up to which windows are closed.", ["partition"]
)
# Computed when it is asked for: it must grow in a worker that stands still.
WATERMARK_AGE_SECONDS = Gauge(
    "meterline_watermark_age_seconds", "How far the watermark is behind the clock.", ["partition"]
)
OLDEST_WINDOW_SECONDS = Gauge(
    "meterline_oldest_unpublished_window_timestamp_seconds",
    "Start of the oldest window with usage that no snapshot says yet; 0: there is none.",
    ["partition"],
)
# What a worker's memory grows with.
DEDUPE_IDS = Gauge("meterline_dedupe_ids", "Event ids in the index that finds duplicates.", ["partition"])
WINDOWS_OPEN = Gauge("meterline_windows_open", "Windows of clients still taking events.", ["partition"])
WINDOWS_PUBLISHED = Counter("meterline_windows_published", "Snapshots published, late ones too.")

# -- every worker: taking in and writing down

# Up to the newest offset the broker has told. Transaction markers count: 1 or 2 is nothing.
LAG_OFFSETS = Gauge(
    "meterline_lag_offsets", "Offsets of the source topic that are not committed as applied.", ["partition"]
)
PENDING_EVENTS = Gauge("meterline_pending_events", "Events taken in and not yet committed.")
FLUSH_STEP_SECONDS = Histogram(
    "meterline_flush_step_seconds",
    "Time of one step of a flush: past, build, insert, commit.",
    ["step"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
COMMITS = Counter("meterline_commits", "Transactions committed by this worker.")
PARTITION_HALTED = Gauge("meterline_partition_halted", "1 where a partition stopped itself.", ["partition"])
# A process that is fenced ends before anybody can ask it: the number is kept in its data folder.
FATAL_EXITS = Counter(
    "meterline_fatal_exits",
    "Ends with exit code 9 in this data folder: a commit was refused (fenced), its outcome is unknown, or "
    "the process had lost its part in the group.",
)

# -- billing

STRIPE_REQUESTS = Counter("meterline_stripe_requests", "Requests to Stripe by outcome.", ["outcome"])
STRIPE_SENDING_STOPPED = Gauge(
    "meterline_stripe_sending_stopped", "1 where Stripe refused the API key and sending stopped."
)
WINDOWS_CONTRADICTED = Counter(
    "meterline_windows_contradicted",
    "Snapshots that say something else than the known one of the same cutoff: none, or a bug.",
)
USAGE_RECORDS_HELD = Gauge("meterline_usage_records_held", "Usage records held, by reason.", ["reason"])
INVOICE_CLOSES_SECONDS = Gauge(
    "meterline_invoice_closes_seconds",
    "Seconds until the next invoice closes without a usage record not told yet; infinite without one.",
    ["partition"],
)

# -- quota workers

QUOTA_TOTALS = Counter(
    "meterline_quota_totals",
    "Totals told to credit buckets, by their answer: applied, older, refused.",
    ["answer"],
)
QUOTA_OPEN = Gauge(
    "meterline_quota_open",
    "Share of the shards whose buckets decide, as the guardian sees it; else 0.",
)
QUOTA_GENERATIONS = Counter(
    "meterline_quota_generations", "Generations begun: rebuilds of every credit bucket."
)
QUOTA_LOG_CLOCK_SECONDS = Gauge(
    "meterline_quota_log_clock_timestamp_seconds", "Log time up to which every shard is accounted."
)
QUOTA_HOLDS_EXPIRED = Counter("meterline_quota_holds_expired", "Holds the sweep ended.")
QUOTA_PERIODS_BEGUN = Counter("meterline_quota_periods_begun", "Baselines published.")
CREDIT_ALERTS_RAISED = Counter("meterline_credit_alerts", "Alerts published.")
WEBHOOK_POSTS = Counter("meterline_webhook_posts", "Posts of alerts to the webhook, by outcome.", ["outcome"])

# -- the quota library, in the processes that use it

QUOTA_DECISIONS = Counter(
    "meterline_quota_decisions", "Reservations asked of this process, by outcome.", ["outcome"]
)
QUOTA_CALL_SECONDS = Histogram(
    "meterline_quota_call_seconds",
    "Time of one batch of calls to Redis, repetitions included.",
    buckets=(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1),
)
QUOTA_BREAKER_OPEN = Gauge(
    "meterline_quota_breaker_open", "Redis servers (of a cluster) that are not asked while policies decide."
)
QUOTA_UNCOVERED_MICRO = Counter(
    "meterline_quota_uncovered_micro", "Micro-credits of work a policy allowed while nobody could decide."
)

# -- the spool, in the processes that meter tasks

SPOOL_WAITING_BYTES = Gauge(
    "meterline_spool_waiting_bytes", "Finished usage on the disk that is not known to be in Kafka."
)
SPOOL_REFUSED = Counter("meterline_spool_refused", "Tasks not begun: the spool, or its disk, is full.")
