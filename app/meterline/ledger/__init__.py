"""ClickHouse, the source of truth: what was used, line by line, and every step of how it was billed."""
