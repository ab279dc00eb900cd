"""The pure core: events, ids, windows, time, credits, usage records. No IO, clock, randomness or logging."""
