"""The client registry: who pays, through which Stripe customer, in which billing periods."""

from __future__ import annotations

from meterline.clients.registry import ClientRegistry

__all__ = ["ClientRegistry"]
