"""The library inside the client's workers: one durable, idempotent usage event per finished task."""

from __future__ import annotations

from meterline.producer.errors import DeliveryFailed, InvalidUsage
from meterline.producer.usage import UsageProducer

__all__ = ["DeliveryFailed", "InvalidUsage", "UsageProducer"]
