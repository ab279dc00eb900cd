"""Metering: usage events to ledger rows, client windows and dead letters, exactly once."""
