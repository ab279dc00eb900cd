"""Metadata: what a sender may attach to any object."""

from __future__ import annotations

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import Params

__all__ = ["take_metadata"]

KEYS_MAX = 50
KEY_LENGTH_MAX = 40
VALUE_LENGTH_MAX = 500
"""Stripe's limits on metadata (API reference, metadata)."""


def take_metadata(params: Params) -> dict[str, str]:
    """The `metadata` parameter; empty values are left out. Raises StripeError 400."""
    metadata = {key: value for key, value in params.text_map("metadata").items() if value}
    if (
        len(metadata) > KEYS_MAX
        or any(len(key) > KEY_LENGTH_MAX for key in metadata)
        or any(len(value) > VALUE_LENGTH_MAX for value in metadata.values())
    ):
        raise StripeError(
            400,
            f"Metadata can have up to {KEYS_MAX} keys of {KEY_LENGTH_MAX} characters, "
            f"with values of {VALUE_LENGTH_MAX} characters.",
            param="metadata",
        )
    return metadata
