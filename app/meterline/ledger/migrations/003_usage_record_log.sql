-- Every step of billing, append-only: how a window's credits became a usage record and what Stripe said.
--
-- Identity is (log_id, partition, seq), alone in the sort key: a step that was written, not committed, and
-- decided anew by the restarted worker takes the same seq and replaces the first one, whatever else changed.
-- `generation` counts the takeovers of the partition: of two rows with one seq the later owner's stays, so
-- that a stalled worker which wakes up cannot overwrite what its successor committed.
-- No PARTITION BY: rows with one identity must always meet, also across the end of a month.
--
-- Money is valued from these rows only up to the committed seq: rows above it were written, not committed.
--
-- On a cluster: ENGINE = ReplicatedReplacingMergeTree(generation) (see 001_events.sql).
CREATE TABLE IF NOT EXISTS usage_record_log
(
    log_id           LowCardinality(String),  -- topic id of usage.windows
    `partition`      UInt32,                  -- of usage.windows
    seq              UInt64,
    generation       UInt64 DEFAULT 0,
    recorded_at      DateTime64(3, 'UTC'),    -- chosen once by the worker, before the commit
    kind             LowCardinality(String),  -- advance | record | attempt | outcome | held | released
    client_id        LowCardinality(String),
    meter            LowCardinality(String),
    map_version      UInt32,
    period_start     DateTime64(3, 'UTC'),
    period_end       DateTime64(3, 'UTC'),
    -- The window and the snapshot of it that this step is about.
    window_id        String,
    window_start     DateTime64(3, 'UTC'),
    window_end       DateTime64(3, 'UTC'),
    source_topic_id  LowCardinality(String),
    source_partition UInt32,
    cutoff_offset    Int64,
    -- By how much the credits of (client, meter, map version, period) changed.
    credits_micro    Int64,
    -- What Stripe is told; identifier '' where nothing is.
    identifier       String,
    event_name       LowCardinality(String),
    stripe_customer  LowCardinality(String),
    value            Int64,
    event_timestamp  DateTime('UTC'),
    idempotency_key  String,
    state            LowCardinality(String),  -- intent | unknown | accepted | duplicate | refused | held | released
    reason           LowCardinality(String),
    first_attempt_at DateTime64(3, 'UTC'),    -- 1970: none yet
    request_id       String,
    detail           String,
    INDEX client_id client_id TYPE bloom_filter GRANULARITY 4
)
ENGINE = ReplacingMergeTree(generation)
ORDER BY (log_id, `partition`, seq);
