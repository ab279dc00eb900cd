"""Brings the state of an older version up to date, when its partition is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from meterline.billing.state import FORMAT_VERSION, BillingState
from meterline.domain.account_books import MeterTerms
from meterline.domain.accounts import Account, AccountKey, Day
from meterline.errors import PartitionHalted

__all__ = ["bring_up_to_date"]


def bring_up_to_date(
    state: BillingState, meters: Mapping[str, MeterTerms], customers: Mapping[str, str]
) -> None:
    """The newest format from the next commit on; nothing else is read from the older one.

    Format 1 kept an account for each version of the meters file and none for each customer, and no days. Its
    units that landed are `undated`: the day-by-day comparison leaves such an account alone, its invoice does
    not. Format 2 did not know Stripe's ids of the meters; they are learnt from the account of the moment.

    Args:
        state: as it was decoded.
        meters: of the meters file.
        customers: client to Stripe customer, for accounts without an open record.

    Raises:
        PartitionHalted: an account's units are not those of the meters file's unit.
    """
    if state.meta.format_version == 1:
        _read_format_1(state, meters, customers)
    if state.meta.format_version < FORMAT_VERSION:
        state.set_meta(replace(state.meta, format_version=FORMAT_VERSION))


def _read_format_1(
    state: BillingState, meters: Mapping[str, MeterTerms], customers: Mapping[str, str]
) -> None:
    told: dict[tuple[str, str, int, int], str] = {
        (record.client_id, record.meter, record.period_start, record.period_end): record.customer
        for record in state.records.values()
    }
    for name, (client_id, meter, version, start, end, credits_micro, units) in list(
        state.format_1_accounts.items()
    ):
        terms = meters.get(meter)
        if terms is None or units != max(0, credits_micro // terms.unit_micro):
            raise PartitionHalted(
                f"the account of {client_id!r} on meter {meter!r} has {units} units of {credits_micro} "
                f"micro-credits under version {version} of the meters file; this file has another unit for "
                "that meter. Give the meter its former unit; a new unit needs a new meter"
            )
        state.use_meter(meter, terms)
        customer = told.get((client_id, meter, start, end), customers.get(client_id, ""))
        key = AccountKey(client_id, meter, start, end, customer)
        before = state.account(key)
        open_units = 0 if key in state.accounts else sum(record.value for record in state.open_records(key))
        after = Account(
            credits_micro=before.credits_micro + credits_micro,
            units=before.units + units,
            undated=before.undated + units - open_units,
        )
        state.drop_format_1(name)
        state.set_account(key, after)
    for record in state.records.values():
        if record.first_attempt_at is not None:
            day = state.days(record.account).get(record.day, Day())
            attempted = day.attempted + max(0, record.value)
            day = replace(day, attempted=attempted, last_attempt_at=record.first_attempt_at)
            state.set_day(record.account, record.day, day)
