"""The domain's `Client` as the record of the topic `clients`, and back."""

from __future__ import annotations

from typing import Any

from meterline.domain.clients import Client, PeriodUnit, QuotaPolicy, check_client
from meterline.domain.reasons import Reason
from meterline.errors import DeadLetterError

__all__ = ["client_from_record", "client_to_record"]


def client_to_record(client: Client) -> dict[str, Any]:
    """The fields of `schemas/client`."""
    return {
        "client_id": client.client_id,
        "stripe_customer_id": client.stripe_customer_id,
        "period_unit": client.period_unit.value,
        "period_anchor": client.period_anchor,
        "quota_policy": client.quota_policy.value,
        "alert_levels_percent": list(client.alert_levels_percent),
        "test": client.test,
        "sending_paused": client.sending_paused,
        "updated_at": client.updated_at,
        "updated_by": client.updated_by,
    }


def client_from_record(record: dict[str, Any]) -> Client:
    """The client in a decoded record.

    Raises:
        DeadLetterError: a field breaks a rule; other programs write this topic, too.
    """
    client = Client(
        **record
        | {
            "period_unit": PeriodUnit(record["period_unit"]),
            "quota_policy": QuotaPolicy(record["quota_policy"]),
            "alert_levels_percent": tuple(record["alert_levels_percent"]),
        }
    )
    try:
        check_client(client)
    except ValueError as error:
        raise DeadLetterError(Reason.INVALID_FIELD, str(error)) from None
    return client
