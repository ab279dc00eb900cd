"""What is known of a partition apart from its state: its ledger rows, and what metering has published of it.

Everything on `usage.totals` and `usage.events.dlq` was committed together with the state of its moment. So
the newest of these statements say how far the partition was surely accounted for, and what each client had
used by then: enough to do without the state, and to judge whether the ledger is whole. All of it blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import is_progress_key, progress_from_record, total_from_record
from meterline.contracts.topics import USAGE_EVENTS_DLQ, USAGE_TOTALS
from meterline.domain.credits import format_credits
from meterline.domain.events import UsageEvent
from meterline.domain.window_lengths import WindowLengths
from meterline.domain.windows import SkuTotal
from meterline.errors import PartitionHalted
from meterline.ledger import queries, repair_queries
from meterline.ledger.client import Client
from meterline.metering.checks import repair_command
from meterline.metering.meter import Meter
from meterline.metering.sliced_index import SlicedIndex
from meterline.metering.slices import SliceFiles
from meterline.metering.state import Meta, parse_total_key, parse_total_value
from meterline.settings import KafkaSettings, MeteringSettings
from meterline.streaming.changelog import read_changelog
from meterline.streaming.committed import read_committed
from meterline.streaming.owner import LogRange

__all__ = [
    "Evidence",
    "RepairTools",
    "Statements",
    "different_totals",
    "lengths_that_were",
    "refused",
    "require_whole_ledger",
    "restored_meter",
]

P = ParamSpec("P")
T = TypeVar("T")

DIFFERENCES_SHOWN_MAX = 5


class Ledger(Protocol):
    """Asks the ledger; `ledger.asker.LedgerAsker` is one."""

    def ask(self, question: Callable[Concatenate[Client, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer of a function that takes a client first."""


@dataclass(frozen=True, slots=True)
class RepairTools:
    """What the repairs of one command share."""

    kafka: KafkaSettings
    metering: MeteringSettings
    ledger: Ledger
    window_partitions: int


@dataclass(frozen=True, slots=True)
class Statements:
    """What metering has published of a partition of one topic id.

    Attributes:
        published_until: offset up to which `totals` say everything; -1: nothing was published.
        accounted_until: log time (ms).
        totals: client -> all it had used up to `published_until`.
        dead: offsets whose records are on the dead-letter topic, as far as that still holds them.
    """

    published_until: int
    accounted_until: int
    totals: Mapping[str, SkuTotal]
    dead: frozenset[int]

    @property
    def committed_until(self) -> int:
        """Every offset up to this one was surely accounted for by a committed state; -1: not known."""
        return max(self.published_until, max(self.dead, default=-1))


@dataclass(frozen=True, slots=True)
class Evidence:
    """A partition as it is found."""

    log: LogRange
    state: Mapping[bytes, bytes]
    statements: Statements

    @classmethod
    def gather(cls, tools: RepairTools, log: LogRange, changelog: str) -> Evidence:
        """Read it all; the owner must be fenced if a commit is to be built upon it."""
        state = read_changelog(tools.kafka, changelog, log.partition)
        return cls(log, state, _read_statements(tools.kafka, log))

    @property
    def totals(self) -> dict[str, SkuTotal]:
        """Client -> all it has used, as the state says."""
        return {
            parse_total_key(key): parse_total_value(value)[0]
            for key, value in self.state.items()
            if key[2:3] == b"T"
        }


def restored_meter(tools: RepairTools, partition: int, meta: Meta, state: Mapping[bytes, bytes]) -> Meter:
    """A meter that is only asked what it knows."""

    def decode(_value: bytes | None) -> UsageEvent:
        raise AssertionError("no record is taken")

    meter = Meter(partition, tools.metering, decode, meta, SlicedIndex(SliceFiles.of(tools.metering)))
    meter.restore(state)
    return meter


def _read_statements(kafka: KafkaSettings, log: LogRange) -> Statements:
    total_codec = RecordCodec("usage-total", kafka.registry_url)
    progress_codec = RecordCodec("usage-progress", kafka.registry_url)
    published_until, accounted_until = -1, 0
    totals: dict[str, SkuTotal] = {}
    for key, value in read_changelog(kafka, USAGE_TOTALS, log.partition).items():
        if is_progress_key(key):
            progress = progress_from_record(progress_codec.decode(value))
            if (progress.topic_id, progress.partition) == (log.topic_id, log.partition):
                published_until, accounted_until = progress.published_until, progress.accounted_until
        else:
            total = total_from_record(total_codec.decode(value))
            if (total.topic_id, total.partition) == (log.topic_id, log.partition):
                totals[total.client_id] = total.sums
    return Statements(published_until, accounted_until, totals, _dead_offsets(kafka, log))


def _dead_offsets(kafka: KafkaSettings, log: LogRange) -> frozenset[int]:
    codec = RecordCodec("dead-letter", kafka.registry_url)
    letters = (
        codec.decode(message.value())
        for messages in read_committed(kafka, USAGE_EVENTS_DLQ, log.partition)
        for message in messages
    )
    return frozenset(letter["offset"] for letter in letters if letter["topic_id"] == log.topic_id)


def require_whole_ledger(tools: RepairTools, evidence: Evidence) -> None:
    """The rows must add up to every total that was published: a state is never rebuilt from less.

    Raises:
        PartitionHalted: naming clients that differ, and the command.
    """
    log, said = evidence.log, evidence.statements
    rows = tools.ledger.ask(queries.lifetime_totals, log.topic_id, log.partition, said.published_until)
    different = different_totals(said.totals, rows)
    if different:
        raise refused(
            log,
            f"the ledger is not what was published up to offset {said.published_until}: "
            f"{'; '.join(different)}. First: {repair_command('ledger', log.partition)}",
        )


def lengths_that_were(tools: RepairTools, log: LogRange) -> WindowLengths:
    """How long the windows must have been that were published; what was not can have any length.

    Of those that billing has not written down yet nothing is known: they must be of one of these lengths.

    Raises:
        PartitionHalted: no change of the length explains them.
    """
    windows = tools.ledger.ask(repair_queries.published_windows, log.topic_id, log.partition)
    if not windows:
        return WindowLengths.of(tools.metering.window_length_ms, tools.metering.window_length_since_ms)
    try:
        return WindowLengths.from_windows(windows)
    except ValueError as error:
        raise refused(log, f"the windows in the ledger fit no lengths: {error}") from error


def different_totals(expected: Mapping[str, SkuTotal], rows: Mapping[str, SkuTotal]) -> list[str]:
    """Some clients for which the two say different things, in words; empty: none."""
    nothing = SkuTotal()
    clients = sorted(
        client
        for client in expected.keys() | rows.keys()
        if expected.get(client, nothing) != rows.get(client, nothing)
    )
    shown = [
        f"client {client}: {_amount(expected.get(client, nothing))} expected, "
        f"{_amount(rows.get(client, nothing))} in the ledger"
        for client in clients[:DIFFERENCES_SHOWN_MAX]
    ]
    rest = len(clients) - len(shown)
    return [*shown, f"and {rest} clients more"] if rest else shown


def _amount(total: SkuTotal) -> str:
    free = f" and {total.free_count} free ones" if total.free_count else ""
    return f"{total.count} events with {format_credits(total.credits_micro)} credits{free}"


def refused(log: LogRange, why: str) -> PartitionHalted:
    """A repair that could not be right: the partition stays halted."""
    return PartitionHalted(f"{log.topic}-{log.partition}: {why}")
