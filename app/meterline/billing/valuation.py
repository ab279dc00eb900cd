"""A verified snapshot becomes advances of accounts and usage records: changes the state, does no IO."""

from __future__ import annotations

from dataclasses import dataclass

from meterline.billing.meters import MeterMap
from meterline.billing.rows import advance_row, record_row
from meterline.billing.state import BillingState
from meterline.domain.billing import (
    Account,
    AccountKey,
    Known,
    amounts_digest,
    changes_of,
    event_timestamp,
    invoice_takes,
)
from meterline.domain.clients import Client, Period, period_of
from meterline.domain.usage_records import UsageRecord, usage_record_identifier
from meterline.domain.windows import WindowSnapshot

__all__ = ["Valuation"]

NOT_SENT = "not_sent"
"""State of an advance whose credits are metered and never reach Stripe."""


@dataclass(frozen=True, slots=True)
class Valuation:
    """Values snapshots of one partition."""

    state: BillingState
    meters: MeterMap
    installation_id: str

    def value(self, snapshot: WindowSnapshot, client: Client, now_ms: int) -> list[UsageRecord]:
        """Absorb a snapshot that is verified and newer than the known one.

        Each meter's change is one row of the ledger, also where it makes no whole unit: the remainder is then
        as durable as what was sent. Usage that its own invoice can't take any more goes to the client's
        current period; the row keeps the original window.

        Returns:
            The new usage records, none of them sent.

        Raises:
            UnmappedSkuError: before anything was changed.
        """
        window_id = snapshot.ref.window_id
        meters = self.meters.credits_by_meter(snapshot.skus)
        changes = changes_of(self.state.windows.get(window_id), meters)
        period = self._period_of(snapshot, client, now_ms)
        records = []
        for meter, change in changes.items():
            record = self._advance(snapshot, client, meter, change, period=period, now_ms=now_ms)
            if record is not None:
                records.append(record)
        self.state.set_window(window_id, Known(snapshot.cutoff_offset, amounts_digest(snapshot.skus), meters))
        return records

    def _period_of(self, snapshot: WindowSnapshot, client: Client, now_ms: int) -> Period:
        own = period_of(client, snapshot.ref.start)
        return own if invoice_takes(own.end, now_ms) else period_of(client, now_ms)

    def _advance(
        self,
        snapshot: WindowSnapshot,
        client: Client,
        meter: str,
        change: int,
        *,
        period: Period,
        now_ms: int,
    ) -> UsageRecord | None:
        ref, cutoff = snapshot.ref, snapshot.cutoff_offset
        key = AccountKey(ref.client_id, meter, self.meters.version, period.start, period.end)
        if client.test:
            row = advance_row(now_ms, ref, cutoff, key, change, state=NOT_SENT, reason="test_client")
            self.state.add_row(row)
            return None
        terms = self.meters.by_name[meter]
        before = self.state.accounts.get(key, Account())
        after = before.absorb(change, terms.unit_micro)
        self.state.set_account(key, after)
        value = after.units - before.units
        if not value:
            self.state.add_row(advance_row(now_ms, ref, cutoff, key, change))
            return None
        record = UsageRecord(
            identifier=usage_record_identifier(
                self.installation_id, ref.client_id, meter, ref.window_id, cutoff
            ),
            client_id=ref.client_id,
            meter=meter,
            map_version=key.map_version,
            period_start=period.start,
            period_end=period.end,
            window_id=ref.window_id,
            window_start=ref.start,
            window_end=ref.end,
            source_topic_id=ref.topic_id,
            source_partition=ref.partition,
            cutoff_offset=cutoff,
            event_name=terms.event_name,
            customer=client.stripe_customer_id or "",
            value=value,
            event_timestamp=event_timestamp(ref.start, ref.end, period.start, period.end, now_ms),
        )
        self.state.add_row(
            advance_row(now_ms, ref, cutoff, key, change, identifier=record.identifier, value=value)
        )
        self.state.set_record(record)
        self.state.add_row(record_row("record", now_ms, record))
        return record
