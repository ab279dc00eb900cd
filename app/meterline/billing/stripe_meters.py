"""Make sure that every meter of the meters file exists at Stripe, as we need it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import stripe

from meterline.billing.meters import Meter
from meterline.billing.outcomes import ANSWERLESS, Answer, classify
from meterline.billing.send import CUSTOMER_KEY, VALUE_KEY
from meterline.domain.encoding import hash_hex
from meterline.errors import RetryLater, UserError
from meterline.logs import get_logger

__all__ = ["EnsuredMeters", "ensure_meters"]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EnsuredMeters:
    """The meters of the meters file, as Stripe has them.

    Attributes:
        ids: name in the meters file -> id at Stripe, which no other account has.
        created: names of those that were missing.
    """

    ids: Mapping[str, str]
    created: Collection[str]


def ensure_meters(client: stripe.StripeClient, meters: Iterable[Meter]) -> EnsuredMeters:
    """Create what is missing; safe to run at the same time in several workers. Blocks.

    Raises:
        RetryLater: Stripe doesn't answer.
        UserError: a meter exists but counts otherwise, or Stripe refuses; the text says what to do.
    """
    ids: dict[str, str] = {}
    created: set[str] = set()
    try:
        listed = client.v1.billing.meters.list({"limit": 100})
        there: dict[str, stripe.billing.Meter] = {}
        for found in listed.auto_paging_iter():
            if found.status == "active" or found.event_name not in there:
                there[found.event_name] = found
        for meter in meters:
            existing = there.get(meter.event_name)
            if existing is None:
                ids[meter.name] = _create(client, meter)
                created.add(meter.name)
            else:
                _check(existing)
                ids[meter.name] = existing.id
    except ANSWERLESS as error:
        raise _explained(error) from error
    return EnsuredMeters(ids, created)


def _create(client: stripe.StripeClient, meter: Meter) -> str:
    key = "mlmeter_" + hash_hex("meterline.stripe-meter.1", meter.event_name, meter.display_name)
    created = client.v1.billing.meters.create(
        {
            "display_name": meter.display_name,
            "event_name": meter.event_name,
            "default_aggregation": {"formula": "sum"},
            "customer_mapping": {"type": "by_id", "event_payload_key": CUSTOMER_KEY},
            "value_settings": {"event_payload_key": VALUE_KEY},
        },
        {"idempotency_key": key, "max_network_retries": 0},
    )
    log.info("meter created at Stripe", meter=meter.name, event_name=meter.event_name, id=created.id)
    return created.id


def _check(found: stripe.billing.Meter) -> None:
    """Whether an existing meter adds our values up as they are. A meter can't be changed afterwards."""
    wanted = {
        "status": (found.status, "active"),
        "default_aggregation.formula": (found.default_aggregation.formula, "sum"),
        "customer_mapping.event_payload_key": (found.customer_mapping.event_payload_key, CUSTOMER_KEY),
        "value_settings.event_payload_key": (found.value_settings.event_payload_key, VALUE_KEY),
        "event_time_window": (found.event_time_window, None),
    }
    if wrong := [f"{what} is {has!r}, not {need!r}" for what, (has, need) in wanted.items() if has != need]:
        raise UserError(
            f"Stripe's meter {found.id} of event name {found.event_name!r} can't be used: "
            f"{'; '.join(wrong)}. Reactivate it if it is inactive; otherwise give another event_name in the "
            "meters file"
        )


def _explained(error: BaseException) -> RetryLater | UserError:
    outcome = classify(error, "")
    if outcome.answer in {Answer.UNKNOWN, Answer.RETRY_LATER}:
        return RetryLater(f"Stripe doesn't answer: {outcome.detail}")
    if outcome.answer is Answer.STOP:
        return UserError(f"Stripe refuses the API key (METERLINE_STRIPE__API_KEY): {outcome.detail}")
    return UserError(f"Stripe refuses to set up the meters: {outcome.detail}")
