"""The sandbox's one API key, and what Stripe says to any other."""

from __future__ import annotations

import base64
import binascii
import secrets

from meterline.local.sandbox.errors import StripeError
from meterline.settings import SANDBOX_API_KEY

__all__ = ["check_api_key"]


def check_api_key(authorization: str) -> None:
    """Accept the sandbox's one key, as `Bearer key` or as the user name of Basic.

    Raises:
        StripeError: 401, in Stripe's form; before any parameter is looked at.
    """
    if authorization == f"Bearer {SANDBOX_API_KEY}":
        return
    scheme, _, credentials = authorization.partition(" ")
    key = credentials.strip()
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(key, validate=True).decode("ascii").partition(":")[0]
        except (binascii.Error, UnicodeDecodeError):
            key = ""
    if scheme.lower() not in ("bearer", "basic") or not key:
        raise StripeError(
            401, "You did not provide an API key. Send it as `Authorization: Bearer YOUR_SECRET_KEY`."
        )
    if "_live_" in key:
        raise StripeError(
            401,
            "This is a live key and this is the local sandbox, which refuses live keys. Real Stripe was not "
            "called. Take the key out of this configuration.",
        )
    if not secrets.compare_digest(key.encode(), SANDBOX_API_KEY.encode()):
        raise StripeError(
            401, f"Invalid API Key provided: {key[:8]}****. The sandbox accepts {SANDBOX_API_KEY}."
        )
