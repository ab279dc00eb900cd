"""Why a record became a dead letter. The codes are part of the public contract."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Reason"]


class Reason(StrEnum):
    """One code per rule that can refuse a record."""

    UNKNOWN_FRAMING = "unknown_framing"
    """Neither Confluent framing nor Avro single-object encoding."""
    UNKNOWN_SCHEMA = "unknown_schema"
    """A schema id or fingerprint no known version has."""
    UNDECODABLE = "undecodable"
    """Truncated, trailing bytes, or not what its schema says."""
    INVALID_FIELD = "invalid_field"
    """A field is empty, too long, or out of its range."""
    NEGATIVE_CREDITS = "negative_credits"
    """Only corrections may be negative."""
    CREDITS_OUT_OF_RANGE = "credits_out_of_range"
    """More in one event than any honest price list says."""
    TIME_IN_FUTURE = "time_in_future"
    """`occurred_at` is more than five minutes ahead of the broker's append time."""
    CONFLICT = "conflict"
    """The same event id with another payload; the first stands."""
    TOO_MANY_SKUS = "too_many_skus"
    """The window of this client already holds the largest number of SKUs."""
    WINDOW_TOTAL_OUT_OF_RANGE = "window_total_out_of_range"
    """The window's total would leave the int64 range."""
    LIFETIME_TOTAL_OUT_OF_RANGE = "lifetime_total_out_of_range"
    """All the client has ever used would leave the int64 range."""
