"""The local stack: real Kafka, Valkey, ClickHouse's engine and a Stripe sandbox, from packages alone."""
