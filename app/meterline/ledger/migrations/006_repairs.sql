-- What a person did to a halted partition: who, why, and what came of it. Written by the command before it
-- acts; a row whose detail says no more than `ordered` tells that the command was interrupted.
-- Identity is repair_id, chosen once by the command.
--
-- On a cluster: ENGINE = ReplicatedReplacingMergeTree (see 001_events.sql).
CREATE TABLE IF NOT EXISTS repair_log
(
    repair_id    String,
    ordered_at   DateTime64(3, 'UTC'),
    action       LowCardinality(String),  -- state | ledger | log
    topic_id     LowCardinality(String),  -- of usage.events, as it is now
    `partition`  UInt32,
    -- The offsets it is about.
    first_offset Int64,
    last_offset  Int64,
    changed_by   String,
    reason       String,
    detail       String
)
ENGINE = ReplacingMergeTree
ORDER BY (ordered_at, repair_id);

CREATE OR REPLACE VIEW repairs AS
SELECT ordered_at, action, topic_id, `partition`, first_offset, last_offset, changed_by, reason, detail, repair_id
FROM repair_log FINAL;
