"""Which alerts are due, each once for its level and epoch: remembered in the changelog, not in Redis.

An alert is published in the transaction that remembers it: neither a crash nor a lost Redis repeats it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meterline.contracts.codec import RecordCodec
from meterline.contracts.partitioner import partition_for
from meterline.contracts.records import alert_to_record
from meterline.contracts.topics import CREDIT_ALERTS
from meterline.domain.alerts import CreditAlert, alert_id, levels_reached
from meterline.domain.buckets import BucketBalance
from meterline.domain.clients import Client
from meterline.streaming.owner import Output

__all__ = ["AlertBook", "alert_output", "epoch_of"]


@dataclass(slots=True)
class _Raised:
    """What a client was told in its present epoch; an older one never comes back."""

    epoch: str
    levels: set[int]


class AlertBook:
    """What was raised, by client."""

    def __init__(
        self, key_prefix: bytes, state: Mapping[bytes, bytes], client_of: Callable[[str], Client]
    ) -> None:
        """Read what was raised from the changelog.

        Args:
            key_prefix: of the records that are the book's; the client's id follows.
        """
        self._prefix = key_prefix
        self._client_of = client_of
        self._raised: dict[str, _Raised] = {}
        for key, value in state.items():
            if key.startswith(key_prefix):
                epoch, levels = json.loads(value)
                self._raised[key.removeprefix(key_prefix).decode()] = _Raised(epoch, set(levels))

    def due(self, client_id: str, balance: BucketBalance, now_ms: int, *, refused: bool) -> list[CreditAlert]:
        """The alerts a client must get now. The caller publishes them and commits `record_of` the client."""
        levels = self._client_of(client_id).alert_levels_percent
        reached = levels_reached(levels, balance, refused=refused)
        if not reached:
            return []
        epoch = epoch_of(balance)
        raised = self._raised.get(client_id)
        if raised is None or raised.epoch != epoch:
            raised = _Raised(epoch, set())
        new = [level for level in reached if level not in raised.levels]
        if new:
            raised.levels.update(new)
            self._raised[client_id] = raised
        return [
            CreditAlert(
                alert_id=alert_id(client_id, level, epoch),
                client_id=client_id,
                level_percent=level,
                period_start=balance.period_start,
                granted_credits_micro=balance.granted,
                consumed_credits_micro=balance.consumed,
                provisional_credits_micro=balance.provisional,
                reserved_credits_micro=balance.reserved,
                available_credits_micro=balance.available,
                raised_at=now_ms,
            )
            for level in new
        ]

    def record_of(self, client_id: str) -> tuple[bytes, bytes]:
        """The changelog record of what a client was told."""
        raised = self._raised[client_id]
        value = json.dumps([raised.epoch, sorted(raised.levels)], separators=(",", ":"))
        return self._prefix + client_id.encode(), value.encode()


def epoch_of(balance: BucketBalance) -> str:
    """In which epoch a level is told once: the budget's period, or how much was granted of prepaid credits.

    A top-up of prepaid credits arms the levels again; credits on top of a period's budget don't.
    """
    if balance.period_start is not None:
        return f"period-{balance.period_start}"
    return f"granted-{balance.granted}"


def alert_output(alert: CreditAlert, codec: RecordCodec, partitions: int) -> Output:
    """The record of an alert, for its client's partition."""
    key = alert.client_id.encode()
    return Output(CREDIT_ALERTS, partition_for(key, partitions), key, codec.encode(alert_to_record(alert)))
