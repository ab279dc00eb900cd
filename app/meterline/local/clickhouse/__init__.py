"""ClickHouse's own engine, chDB, as a server: `python -m meterline.local.clickhouse`."""
