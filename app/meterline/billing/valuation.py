"""A verified snapshot becomes advances of accounts and usage records: changes the state, does no IO."""

from __future__ import annotations

from dataclasses import dataclass

from meterline.billing.meters import MeterMap
from meterline.billing.rows import unsent_row
from meterline.billing.state import BillingState
from meterline.domain.account_books import About, AccountBooks
from meterline.domain.accounts import AccountKey
from meterline.domain.billing import Known, amounts_digest, changes_of
from meterline.domain.clients import Client, Period, period_of
from meterline.domain.usage_records import UsageRecord
from meterline.domain.windows import WindowSnapshot

__all__ = ["Valuation"]


@dataclass(frozen=True, slots=True)
class Valuation:
    """Values snapshots of one partition."""

    state: BillingState
    meters: MeterMap
    books: AccountBooks

    def value(self, snapshot: WindowSnapshot, client: Client, now_ms: int) -> list[UsageRecord]:
        """Absorb a snapshot that is verified and newer than the known one.

        Each meter's change is one row of the ledger, also where it makes no whole unit. Usage that its own
        invoice can't take any more goes to the client's current period; the row keeps the original window.

        Returns:
            The new usage records, none of them sent.

        Raises:
            UnmappedSkuError: before anything was changed.
        """
        ref = snapshot.ref
        meters = self.meters.credits_by_meter(snapshot.skus)
        about = About.window(ref, snapshot.cutoff_offset)
        records = []
        for meter, change in changes_of(self.state.windows.get(ref.window_id), meters).items():
            own = _key(client, meter, period_of(client, ref.start))
            if client.test:
                row = unsent_row(
                    now_ms, about, own, change, map_version=self.meters.version, reason="test_client"
                )
                self.state.add_row(row)
                continue
            self.state.use_meter(meter, self.meters.terms[meter])
            if self.books.takes(own, now_ms):
                record = self.books.advance(own, change, about, now_ms)
            else:
                current = _key(client, meter, period_of(client, now_ms))
                record = self.books.advance(current, change, about, now_ms, reason="moved")
            if record is not None:
                records.append(record)
        known = Known(snapshot.cutoff_offset, amounts_digest(snapshot.skus), meters)
        self.state.set_window(ref.window_id, known)
        return records


def _key(client: Client, meter: str, period: Period) -> AccountKey:
    return AccountKey(client.client_id, meter, period.start, period.end, client.stripe_customer_id or "")
