-- One row for each accepted usage event: the fulfillment log that clients see line by line.
--
-- A row is a pure function of the Kafka record (no now(), no worker's name), and its identity, the record's
-- place in the log (topic_id, partition, offset), ends the sort key. So a row that is inserted again is the
-- same row, and no merge can eat a twin: the same event_id at another offset stays.
--
-- PARTITION BY append day: the dedupe index of a restarting worker is rebuilt from the newest days alone.
-- All copies of a row carry the same append time, so they always meet in one partition.
--
-- On a cluster: ENGINE = ReplicatedReplacingMergeTree, and in the settings profile of Meterline's user
--   insert_quorum = 'auto', insert_quorum_parallel = 0, select_sequential_consistency = 1
-- because the dedupe index is read back from this table: a lagging replica = double counting.
CREATE TABLE IF NOT EXISTS events
(
    topic_id           LowCardinality(String),
    `partition`        UInt32,
    `offset`           Int64,
    appended_at        DateTime64(3, 'UTC'),
    client_id          LowCardinality(String),
    event_id           String,
    correlation_id     String,
    sku                LowCardinality(String),
    credits_micro      Int64,
    billable           Bool,
    occurred_at        DateTime64(3, 'UTC'),
    source             LowCardinality(String),
    attributes         Map(String, String),
    reservation_id     Nullable(String),
    -- What this event corrects, and where that copy stands in the log; '' and zeros: nothing.
    corrects_event_id  String,
    corrects_kind      LowCardinality(String),
    corrects_topic_id  LowCardinality(String),
    corrects_partition UInt32,
    corrects_offset    Int64,
    -- 96 bits of the identity (client_id, event_id), and 64 bits of what a second copy must agree in.
    identity_hash      UInt128,
    payload_digest     UInt64
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(appended_at)
ORDER BY (client_id, occurred_at, topic_id, `partition`, `offset`);
