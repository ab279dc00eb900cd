-- One row for each snapshot published to usage.windows: "this window held so much as of cutoff_offset".
-- Every snapshot stays true for ever; a later cutoff replaces an earlier one (the view `windows`).
--
-- Where the statement stands in usage.windows ends the sort key, so that two statements with one cutoff and
-- different amounts, which must never exist, would both stay and be found.
--
-- The arrays belong together: the n-th SKU has the n-th count and credits.
--
-- On a cluster: ENGINE = ReplicatedReplacingMergeTree (see 001_events.sql).
CREATE TABLE IF NOT EXISTS window_snapshots
(
    window_id          String,
    client_id          LowCardinality(String),
    window_start       DateTime64(3, 'UTC'),
    window_end         DateTime64(3, 'UTC'),
    topic_id           LowCardinality(String),  -- of usage.events
    `partition`        UInt32,                  -- of usage.events
    cutoff_offset      Int64,
    skus               Array(String),
    counts             Array(UInt64),
    credits_micro      Array(Int64),
    free_counts        Array(UInt64),
    free_credits_micro Array(Int64),
    closed_at          DateTime64(3, 'UTC'),
    watermark          DateTime64(3, 'UTC'),
    log_topic_id       LowCardinality(String),  -- of usage.windows
    log_partition      UInt32,
    log_offset         Int64
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMM(window_start)
ORDER BY (client_id, window_start, topic_id, `partition`, window_id, cutoff_offset,
          log_topic_id, log_partition, log_offset);
