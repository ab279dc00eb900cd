-- What analysts read. The names and columns are stable; docs/ledger.md describes them.
--
-- FINAL: a row that was inserted twice counts once, before and after a merge. Copies of a row always share
-- their partition (see the tables), so partitions need not be merged with each other while reading.

CREATE OR REPLACE VIEW usage AS
SELECT
    client_id,
    occurred_at,
    sku,
    toDecimal128(credits_micro, 6) / 1000000 AS credits,
    credits_micro,
    billable,
    correlation_id,
    event_id,
    source,
    attributes,
    reservation_id,
    corrects_event_id,
    corrects_kind,
    corrects_topic_id,
    corrects_partition,
    corrects_offset,
    -- Stripe takes no usage older than 35 days; such an event is listed and billed in the current period.
    toBool(occurred_at < appended_at - INTERVAL 35 DAY) AS beyond_billing_horizon,
    appended_at,
    topic_id,
    `partition`,
    `offset`
FROM events FINAL
SETTINGS do_not_merge_across_partitions_select_final = 1;

-- The latest snapshot of each window. A window is here when it is closed.
CREATE OR REPLACE VIEW windows AS
SELECT
    client_id,
    window_start,
    window_end,
    topic_id,
    `partition`,
    window_id,
    cutoff_offset,
    arraySum(latest.counts) AS events,
    toDecimal128(arraySum(latest.credits_micro), 6) / 1000000 AS credits,
    arraySum(latest.free_counts) AS free_events,
    toDecimal128(arraySum(latest.free_credits_micro), 6) / 1000000 AS free_credits,
    latest.skus AS skus,
    latest.counts AS counts,
    latest.credits_micro AS credits_micro,
    latest.free_counts AS free_counts,
    latest.free_credits_micro AS free_credits_micro,
    snapshots,
    first_closed_at,
    latest.closed_at AS closed_at,
    latest.watermark AS watermark
FROM
(
    SELECT
        client_id, window_start, window_end, topic_id, `partition`, window_id,
        max(window_snapshots.cutoff_offset) AS cutoff_offset,
        uniqExact(window_snapshots.cutoff_offset) AS snapshots,
        min(window_snapshots.closed_at) AS first_closed_at,
        -- Of statements with one cutoff the first in the log stands.
        argMax(
            CAST(
                (skus, counts, credits_micro, free_counts, free_credits_micro, closed_at, watermark),
                'Tuple(skus Array(String), counts Array(UInt64), credits_micro Array(Int64), free_counts Array(UInt64), free_credits_micro Array(Int64), closed_at DateTime64(3, \'UTC\'), watermark DateTime64(3, \'UTC\'))'
            ),
            (window_snapshots.cutoff_offset, -log_offset)
        ) AS latest
    FROM window_snapshots
    GROUP BY client_id, window_start, window_end, topic_id, `partition`, window_id
);

-- An hour of a client is closed when each of its events lies in a closed window and the watermark of each
-- partition they came from has passed the hour (windows may be shorter or longer than an hour).
CREATE OR REPLACE VIEW usage_by_hour AS
SELECT
    used.client_id AS client_id,
    toStartOfHour(used.occurred_at) AS hour,
    used.sku AS sku,
    countIf(used.billable) AS events,
    toDecimal128(sumIf(toInt128(used.credits_micro), used.billable), 6) / 1000000 AS credits,
    countIf(NOT used.billable) AS free_events,
    toDecimal128(sumIf(toInt128(used.credits_micro), NOT used.billable), 6) / 1000000 AS free_credits,
    toBool(min(used.occurred_at < published.window_end AND used.hour_end <= passed.watermark)) AS closed
FROM
(
    SELECT *, toStartOfHour(occurred_at) + INTERVAL 1 HOUR AS hour_end
    FROM events FINAL
    SETTINGS do_not_merge_across_partitions_select_final = 1
) AS used
ASOF LEFT JOIN
(
    SELECT DISTINCT client_id, topic_id, `partition`, window_start, window_end FROM window_snapshots
) AS published
    ON used.client_id = published.client_id AND used.topic_id = published.topic_id
    AND used.`partition` = published.`partition` AND used.occurred_at >= published.window_start
LEFT JOIN
(
    SELECT topic_id, `partition`, max(window_snapshots.watermark) AS watermark
    FROM window_snapshots GROUP BY topic_id, `partition`
) AS passed
    ON used.topic_id = passed.topic_id AND used.`partition` = passed.`partition`
GROUP BY client_id, hour, sku;

-- Where each usage record stands, one row for each identifier, and the advances and holds without one.
CREATE OR REPLACE VIEW usage_records AS
SELECT
    client_id,
    meter,
    map_version,
    period_start,
    period_end,
    window_id,
    window_start,
    window_end,
    source_topic_id,
    source_partition,
    cutoff_offset,
    toDecimal128(credits_of_thing, 6) / 1000000 AS credits,
    identifier,
    event_name,
    stripe_customer,
    value,
    event_timestamp,
    idempotency_key,
    state,
    reason,
    attempts,
    first_attempt_at,
    request_id,
    detail,
    first_recorded_at,
    last_recorded_at,
    log_id,
    `partition`,
    last_seq
FROM
(
    SELECT
        step.log_id AS log_id,
        step.`partition` AS `partition`,
        step.client_id AS client_id,
        step.meter AS meter,
        step.identifier AS identifier,
        -- Without an identifier: an advance that is no record, or a hold of a window.
        multiIf(step.identifier != '', '', step.kind IN ('held', 'released'), step.window_id, toString(step.seq)) AS thing,
        -- What a usage record is about stands in its first row and never changes.
        argMin(step.map_version, step.seq) AS map_version,
        argMin(step.period_start, step.seq) AS period_start,
        argMin(step.period_end, step.seq) AS period_end,
        argMin(step.window_id, step.seq) AS window_id,
        argMin(step.window_start, step.seq) AS window_start,
        argMin(step.window_end, step.seq) AS window_end,
        argMin(step.source_topic_id, step.seq) AS source_topic_id,
        argMin(step.source_partition, step.seq) AS source_partition,
        argMin(step.cutoff_offset, step.seq) AS cutoff_offset,
        -- Of a held window what it would add; it becomes an advance when it is released.
        if(
            step.identifier = '' AND argMaxIf(step.state, step.seq, step.state != '') = 'held',
            toInt128(argMax(step.credits_micro, step.seq)),
            sumIf(toInt128(step.credits_micro), step.kind = 'advance')
        ) AS credits_of_thing,
        argMaxIf(step.event_name, step.seq, step.event_name != '') AS event_name,
        argMaxIf(step.stripe_customer, step.seq, step.stripe_customer != '') AS stripe_customer,
        argMaxIf(step.value, step.seq, step.value != 0) AS value,
        max(step.event_timestamp) AS event_timestamp,
        max(step.idempotency_key) AS idempotency_key,
        argMaxIf(step.state, step.seq, step.state != '') AS state,
        argMaxIf(step.reason, step.seq, step.state != '') AS reason,
        countIf(step.kind = 'attempt') AS attempts,
        max(step.first_attempt_at) AS first_attempt_at,
        argMaxIf(step.request_id, step.seq, step.request_id != '') AS request_id,
        argMaxIf(step.detail, step.seq, step.state != '') AS detail,
        min(step.recorded_at) AS first_recorded_at,
        max(step.recorded_at) AS last_recorded_at,
        max(step.seq) AS last_seq
    FROM usage_record_log AS step FINAL
    GROUP BY log_id, `partition`, client_id, meter, identifier, thing
);
