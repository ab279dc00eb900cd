-- What clients were given, and every change of their credits by a person: append-only.
--
-- credit_grant_log: one row for each record of credit.grants, a function of the log up to that record, so that
-- a quota worker which reads the log again writes the same rows. Identity is (log_id, partition, offset).
-- No PARTITION BY: grants are few, and rows with one identity must always meet.
--
-- On a cluster: ENGINE = ReplicatedReplacingMergeTree (see 001_events.sql).
CREATE TABLE IF NOT EXISTS credit_grant_log
(
    log_id               LowCardinality(String),  -- topic id of credit.grants
    `partition`          UInt32,                  -- of credit.grants
    `offset`             Int64,
    appended_at          DateTime64(3, 'UTC'),
    grant_id             String,
    client_id            LowCardinality(String),
    kind                 LowCardinality(String),  -- prepaid | budget | baseline
    credits_micro        Int64,
    period_start         DateTime64(3, 'UTC'),    -- 1970: a prepaid grant has no period
    period_end           DateTime64(3, 'UTC'),    -- 1970: only a baseline has one
    -- The base of a baseline, one element for each source partition.
    base_topic_ids       Array(LowCardinality(String)),
    base_partitions      Array(UInt32),
    base_cutoff_offsets  Array(Int64),
    base_credits_micro   Array(Int64),
    granted_at           DateTime64(3, 'UTC'),
    granted_by           String,
    reason               String,
    outcome              LowCardinality(String),  -- applied | known | older_period
    INDEX client_id client_id TYPE bloom_filter GRANULARITY 4
)
ENGINE = ReplacingMergeTree
ORDER BY (log_id, `partition`, `offset`);

-- What a person did to credit buckets, written by the command before it acts: who, and why.
-- Identity is change_id, chosen once by the command.
CREATE TABLE IF NOT EXISTS quota_change_log
(
    change_id       String,
    changed_at      DateTime64(3, 'UTC'),
    action          LowCardinality(String),  -- void | rebuild
    client_id       LowCardinality(String),  -- '': all clients
    grant_id        String,
    reservation_id  String,
    credits_micro   Int64,
    changed_by      String,
    reason          String,
    detail          String
)
ENGINE = ReplacingMergeTree
ORDER BY (changed_at, change_id);

CREATE OR REPLACE VIEW credit_grants AS
SELECT
    client_id,
    grant_id,
    kind,
    toDecimal128(credits_micro, 6) / 1000000 AS credits,
    credits_micro,
    if(kind = 'prepaid', NULL, period_start) AS period_start,
    if(kind = 'baseline', period_end, NULL) AS period_end,
    toDecimal128(arraySum(base_credits_micro), 6) / 1000000 AS base,
    arraySum(base_credits_micro) AS base_micro,
    granted_at,
    granted_by,
    reason,
    outcome,
    appended_at,
    log_id,
    `partition`,
    `offset`
FROM credit_grant_log FINAL;

CREATE OR REPLACE VIEW quota_changes AS
SELECT
    changed_at,
    action,
    client_id,
    grant_id,
    reservation_id,
    toDecimal128(credits_micro, 6) / 1000000 AS credits,
    credits_micro,
    changed_by,
    reason,
    detail,
    change_id
FROM quota_change_log FINAL;
