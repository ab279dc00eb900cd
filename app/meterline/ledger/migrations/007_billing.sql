-- Reconciliation and periods of billing, and what persons order of it.
--
-- New kinds of rows in usage_record_log:
--   notice      Stripe rejected a record it had accepted; `detail` has its identifier
--   confirmed   a day's summary at Stripe (`value`) shows what was told
--   reconciled  it doesn't: everything attempted was settled at `value`, the rest made anew
--   settled     a record that was open when its day or its period was settled
--   close       a period against its own invoice, which charges `value` units; `credits_micro` is minus the carry
--   order       an order of a person was carried out (`detail`)
--   carry_part  where the carry comes from (`reason`); the parts add up to it
-- and an advance whose reason is `carry` (from a closed period) or `moved` (its own invoice was closed).
ALTER TABLE usage_record_log ADD INDEX IF NOT EXISTS identifier identifier TYPE bloom_filter GRANULARITY 4;

-- Append-only; identity is order_id, chosen once by the command. The worker lists what came of it in
-- usage_record_log, with the order's id.
CREATE TABLE IF NOT EXISTS billing_order_log
(
    order_id     String,
    ordered_at   DateTime64(3, 'UTC'),
    action       LowCardinality(String),  -- release | resolve | pause | resume | shadow
    client_id    LowCardinality(String),  -- '': all clients
    target       String,                  -- identifier of a record, or id of an account
    value        Int64,                   -- resolve: units the invoice charges
    ordered_by   String,
    reason       String
)
ENGINE = ReplacingMergeTree
ORDER BY (ordered_at, order_id);

CREATE OR REPLACE VIEW billing_orders AS
SELECT ordered_at, action, client_id, target, value, ordered_by, reason, order_id
FROM billing_order_log FINAL;

-- A client's meter in a billing period, on one customer's invoice: what came in, what was invoiced, what is left.
--   credits = usage + moved_in + carried_in;   credits_invoiced + carried_out = credits, once it is closed
CREATE OR REPLACE VIEW billing_periods AS
SELECT
    client_id,
    meter,
    period_start,
    period_end,
    stripe_customer,
    toDecimal128(usage_micro, 6) / 1000000 AS usage,
    toDecimal128(moved_in_micro, 6) / 1000000 AS moved_in,
    toDecimal128(carried_in_micro, 6) / 1000000 AS carried_in,
    units,
    closed,
    invoice_units,
    toDecimal128(carried_out_micro, 6) / 1000000 AS carried_out,
    toDecimal128(remainder_micro, 6) / 1000000 AS remainder,
    toDecimal128(not_landed_micro, 6) / 1000000 AS not_landed,
    toDecimal128(late_micro, 6) / 1000000 AS late,
    toDecimal128(clipped_micro, 6) / 1000000 AS clipped,
    days_confirmed,
    days_reconciled,
    last_recorded_at
FROM
(
    SELECT
        client_id, meter, period_start, period_end, stripe_customer,
        sumIf(toInt128(credits_micro), kind = 'advance' AND reason NOT IN ('carry', 'moved')) AS usage_micro,
        sumIf(toInt128(credits_micro), kind = 'advance' AND reason = 'moved') AS moved_in_micro,
        sumIf(toInt128(credits_micro), kind = 'advance' AND reason = 'carry') AS carried_in_micro,
        sumIf(step.value, kind = 'advance') AS units,
        toBool(countIf(kind = 'close') > 0) AS closed,
        sumIf(step.value, kind = 'close') AS invoice_units,
        -sumIf(toInt128(credits_micro), kind = 'close') AS carried_out_micro,
        sumIf(toInt128(credits_micro), kind = 'carry_part' AND reason = 'remainder') AS remainder_micro,
        sumIf(toInt128(credits_micro), kind = 'carry_part' AND reason = 'not_landed') AS not_landed_micro,
        sumIf(toInt128(credits_micro), kind = 'carry_part' AND reason = 'late') AS late_micro,
        sumIf(toInt128(credits_micro), kind = 'carry_part' AND reason = 'clipped') AS clipped_micro,
        uniqExactIf(step.window_id, kind = 'confirmed') AS days_confirmed,
        uniqExactIf(step.window_id, kind = 'reconciled') AS days_reconciled,
        max(recorded_at) AS last_recorded_at
    FROM usage_record_log AS step FINAL
    WHERE kind IN ('advance', 'close', 'carry_part', 'confirmed', 'reconciled') AND state != 'not_sent'
    GROUP BY client_id, meter, period_start, period_end, stripe_customer
);

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
    -- Steps of a whole day or period are in the view billing_periods.
    WHERE step.kind NOT IN ('order', 'notice', 'confirmed', 'reconciled', 'close', 'carry_part')
    GROUP BY log_id, `partition`, client_id, meter, identifier, thing
);
