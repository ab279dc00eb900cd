"""What became of every offset of a partition, as the committed counters say: invariant 1 in numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meterline.errors import PartitionHalted
from meterline.metering.checks import check_range
from meterline.metering.state import Meta
from meterline.streaming.owner import LogRange

__all__ = ["OffsetAccount", "account_of"]


@dataclass(frozen=True, slots=True)
class OffsetAccount:
    """Offsets of one partition, first to last inclusive, and what they ended as.

    Attributes:
        first: offset the partition was begun at.
        last: newest applied one; below `first`: none.
        lag: offsets behind it, up to the end of the log.
        control: offsets without a data record: transaction markers and aborted records.
        unknown: offsets of which a repair could not tell what became of them.
        problem: why the two sides are not equal, or don't belong to this log; empty: they do and are.
    """

    partition: int
    first: int
    last: int
    lag: int
    accepted: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    control: int = 0
    unknown: int = 0
    watermark_ms: int = 0
    appended_at_ms: int = 0
    problem: str = ""

    @property
    def offsets(self) -> int:
        """How many there are."""
        return self.last - self.first + 1

    @property
    def counted(self) -> int:
        """How many of them ended as something."""
        return self.accepted + self.duplicates + self.dead_letters + self.control + self.unknown


def account_of(meta: Meta | None, log: LogRange) -> OffsetAccount:
    """Compare the counters of a partition with its offsets.

    Args:
        meta: its committed state; None: no worker has ever had it, which is equal: nothing is counted.
        log: where its log stands, asked after the state was read.
    """
    if meta is None:
        return OffsetAccount(
            log.partition, log.start_offset, log.start_offset - 1, log.end_offset - log.start_offset
        )
    counters = meta.counters
    account = OffsetAccount(
        partition=log.partition,
        first=counters.first_offset,
        last=meta.applied_offset,
        lag=log.end_offset - 1 - meta.applied_offset,
        accepted=counters.accepted,
        duplicates=counters.duplicates,
        dead_letters=counters.dead_letters,
        control=counters.skipped,
        unknown=counters.unknown,
        watermark_ms=meta.watermark,
        appended_at_ms=meta.appended_at,
    )
    return replace(account, problem=_problem_of(account, meta, log))


def _problem_of(account: OffsetAccount, meta: Meta, log: LogRange) -> str:
    if account.offsets != account.counted:
        return (
            f"{log.topic}-{log.partition}: {account.counted} of {account.offsets} offsets are counted: "
            f"{abs(account.offsets - account.counted)} too "
            + ("few" if account.counted < account.offsets else "many")
        )
    try:
        check_range(meta, log)
    except PartitionHalted as halted:
        return str(halted)
    return ""
