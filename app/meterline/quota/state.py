"""The bytes of quota's state table: one changelog record per key below, partition first.

M  meta         where the partition of usage.totals stands (JSON)
G  generation   of the buckets; partition 0 only (JSON)
L  ledger       up to which offset each partition of credit.grants is in the ledger; partition 0 only (JSON)
A  alerts       (client) -> what it was told in its present epoch; partition 0 only (JSON)
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass

from meterline.errors import PartitionHalted

__all__ = ["FORMAT_VERSION", "Meta", "alerts_prefix", "generation_key", "ledger_key", "meta_key"]

FORMAT_VERSION = 1
"""Raised with every change of the record below; a newer one than ours is not read."""

_HEAD = struct.Struct(">Hc")  # partition, kind


@dataclass(frozen=True, slots=True)
class Meta:
    """Where a partition stands.

    Attributes:
        topic_id: of usage.totals; another one under the same name is another log.
        applied_offset: the buckets were told every record up to this one, once; -1 before the first.
    """

    topic_id: str
    applied_offset: int = -1
    format_version: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """As it stands in the changelog."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Meta:
        """Read it back.

        Raises:
            PartitionHalted: a newer version of Meterline wrote it.
        """
        record = json.loads(data)
        if record["format_version"] > FORMAT_VERSION:
            raise PartitionHalted(
                f"the state of quota has format {record['format_version']}, this version of Meterline reads "
                f"{FORMAT_VERSION}, and changes nothing. Run the newer version here, too"
            )
        return cls(**record)


def meta_key(partition: int) -> bytes:
    """Key of Meta."""
    return _HEAD.pack(partition, b"M")


def generation_key(partition: int) -> bytes:
    """Key of the Generation."""
    return _HEAD.pack(partition, b"G")


def ledger_key(partition: int) -> bytes:
    """Key of the offsets that are in the ledger."""
    return _HEAD.pack(partition, b"L")


def alerts_prefix(partition: int) -> bytes:
    """What the keys of clients' alerts begin with; the client's id follows."""
    return _HEAD.pack(partition, b"A")
