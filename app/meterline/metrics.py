"""The catalogue of metrics: every name, its type and its meaning, in one place.

Base units (seconds, bytes), `_total` for counters, no client id as a label: there may be millions of them.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

__all__ = [
    "COMMITS",
    "DEAD_LETTERS",
    "EVENTS_TAKEN",
    "FLUSH_STEP_SECONDS",
    "PARTITION_HALTED",
    "PENDING_EVENTS",
    "STRIPE_REQUESTS",
    "STRIPE_SENDING_STOPPED",
    "USAGE_RECORDS_HELD",
    "WATERMARK_SECONDS",
    "WINDOWS_CONTRADICTED",
    "WINDOWS_OPEN",
    "WINDOWS_PUBLISHED",
]

EVENTS_TAKEN = Counter("meterline_events", "Records of usage.events by what became of them.", ["disposition"])
DEAD_LETTERS = Counter("meterline_dead_letters", "Dead letters by reason code.", ["reason"])
WATERMARK_SECONDS = Gauge(
    "meterline_watermark_timestamp_seconds", "Event time up to which windows are closed.", ["partition"]
)
WINDOWS_OPEN = Gauge("meterline_windows_open", "Windows of clients still taking events.", ["partition"])
WINDOWS_PUBLISHED = Counter("meterline_windows_published", "Snapshots published, late ones too.")
PENDING_EVENTS = Gauge("meterline_pending_events", "Events taken in and not yet committed.")
FLUSH_STEP_SECONDS = Histogram(
    "meterline_flush_step_seconds",
    "Time of one step of a flush.",
    ["step"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
COMMITS = Counter("meterline_commits", "Transactions committed by this worker.")
PARTITION_HALTED = Gauge("meterline_partition_halted", "1 where a partition stopped itself.", ["partition"])
STRIPE_REQUESTS = Counter("meterline_stripe_requests", "Requests to Stripe by outcome.", ["outcome"])
STRIPE_SENDING_STOPPED = Gauge(
    "meterline_stripe_sending_stopped", "1 where Stripe refused the API key and sending stopped."
)
WINDOWS_CONTRADICTED = Counter(
    "meterline_windows_contradicted",
    "Snapshots that say something else than the known one of the same cutoff: none, or a bug.",
)
USAGE_RECORDS_HELD = Gauge("meterline_usage_records_held", "Usage records held, by reason.", ["reason"])
