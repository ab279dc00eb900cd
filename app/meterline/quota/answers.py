"""What the library takes and answers: immutable, amounts in integer micro-credits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, NamedTuple, cast

from meterline.domain.credits import CREDITS_MICRO_MAX, MICRO, to_micro
from meterline.domain.events import ID_BYTES_MAX
from meterline.quota.errors import (
    CreditsExhausted,
    InvalidReservation,
    QuotaUnavailable,
    ReservationConflict,
    ReservationLapsed,
)

__all__ = [
    "TTL_S_MAX",
    "Balance",
    "Credits",
    "Outcome",
    "Part",
    "Reservation",
    "SettledColumns",
    "credits_of",
    "id_checked",
    "is_plain",
    "micro_of",
    "parts_checked",
    "settled_checked",
    "ttl_ms_of",
    "wanted_checked",
]

Credits = Decimal | int | str
"""An amount as callers write it: `Decimal("17.25")`, `3`, `"0.000001"`. Floats are inexact and refused."""

WHOLE_CREDITS_MAX: Final = CREDITS_MICRO_MAX // MICRO

PARTS_MAX = 1_000
"""Parts of one settle call. A task with more events names them in several, `final` in the last."""
OFFSET_MAX = 2**53 - 1
"""Redis' scripts count in doubles; no Kafka partition comes near."""
TTL_S_MAX = 86_400
"""A day, as in the settings: a hold that outlives it is a budget, not a reservation."""
PARTITION_MAX = 2**31 - 1
TOPICS_MAX = 1_000
_TOPIC_ID = re.compile(r"[A-Za-z0-9._+/=-]{1,249}")
_topics: set[str] = set()
"""Names that were looked at: a process publishes to a few topics."""
_SURELY_SHORT = ID_BYTES_MAX // 4
"""Characters that never take more bytes than the limit in UTF-8."""


class Reservation(NamedTuple):
    """Credits set aside for one piece of work.

    A tuple, because it is made on the hottest path there is: a frozen dataclass costs five times as much.

    Attributes:
        ttl_s: how long it stands without being renewed.
        generation: of the bucket; 0: not known (not covered).
        done: this work was reserved *and settled* before: don't do it again.
        covered: False: no credits are set aside; nobody could decide, and the client's policy allowed it.
    """

    reservation_id: str
    client_id: str
    credits_micro: int
    ttl_s: float
    generation: int
    done: bool
    covered: bool


class Part(NamedTuple):
    """One published usage event: where it stands in the log, and what it costs (micro-credits)."""

    topic_id: str
    partition: int
    offset: int
    credits_micro: int


@dataclass(frozen=True, slots=True)
class Balance:
    """A client's bucket at one instant. `available = granted - consumed - provisional - reserved`.

    Attributes:
        granted_micro: prepaid credits, or the budget of the period.
        consumed_micro: what the log has charged (in this period).
        provisional_micro: settled, and not yet accounted in the log.
        reserved_micro: set aside for work that runs.
        available_micro: what can be reserved now; negative is debt.
        is_open: False while the buckets are rebuilt: nothing is reserved then.
        period_start: of the budget (ms since the epoch); None: prepaid.
    """

    client_id: str
    granted_micro: int
    consumed_micro: int
    provisional_micro: int
    reserved_micro: int
    available_micro: int
    is_open: bool
    generation: int
    period_start: int | None

    @property
    def granted(self) -> Decimal:
        """In credits, exact."""
        return credits_of(self.granted_micro)

    @property
    def consumed(self) -> Decimal:
        """In credits, exact."""
        return credits_of(self.consumed_micro)

    @property
    def provisional(self) -> Decimal:
        """In credits, exact."""
        return credits_of(self.provisional_micro)

    @property
    def reserved(self) -> Decimal:
        """In credits, exact."""
        return credits_of(self.reserved_micro)

    @property
    def available(self) -> Decimal:
        """In credits, exact; negative is debt."""
        return credits_of(self.available_micro)


Outcome = (
    Reservation
    | CreditsExhausted
    | QuotaUnavailable
    | ReservationConflict
    | ReservationLapsed
    | InvalidReservation
)
"""Of one reservation among many: made, or why not."""


def credits_of(micro: int) -> Decimal:
    """Exact: a bucket's amounts have at most 16 digits, a Decimal's context 28."""
    return Decimal(micro).scaleb(-6)


def micro_of(amount: Credits) -> int:
    """Micro-credits to reserve.

    Raises:
        InvalidReservation: not an exact amount above zero, or beyond what one event may cost.
    """
    if type(amount) is int and 0 < amount <= WHOLE_CREDITS_MAX:
        return amount * MICRO
    try:
        micro = to_micro(amount)
    except ValueError as error:
        raise InvalidReservation(str(error)) from None
    if micro <= 0:
        raise InvalidReservation(f"credits {amount} must be more than 0")
    return micro


def id_checked(what: str, value: str) -> str:
    """The id, if it can be one.

    Raises:
        InvalidReservation: not a string of 1 to `ID_BYTES_MAX` bytes.
    """
    if type(value) is str and 0 < len(value) <= _SURELY_SHORT and value.isascii():
        return value
    if not isinstance(value, str) or not value:
        raise InvalidReservation(f"{what} must be a string that isn't empty, not {value!r}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidReservation(f"{what} {value!r} is no valid text (half a surrogate pair)") from None
    if size > ID_BYTES_MAX:
        raise InvalidReservation(f"{what} has {size} bytes; at most {ID_BYTES_MAX} are allowed")
    return value


def ttl_ms_of(ttl_s: float) -> int:
    """Milliseconds of a time to live.

    Raises:
        InvalidReservation: below a millisecond, or above a day.
    """
    if not 0.001 <= ttl_s <= TTL_S_MAX:
        raise InvalidReservation(f"ttl_s must be from 0.001 to {TTL_S_MAX} seconds, not {ttl_s}")
    return int(ttl_s * 1_000)


def parts_checked(parts: Iterable[Part]) -> Sequence[Part]:
    """The parts, if a bucket can hold them; the caller may change his own list afterwards.

    Raises:
        InvalidReservation: too many, or one of them is no position with an amount.
    """
    checked = tuple(parts)
    if len(checked) > PARTS_MAX:
        raise InvalidReservation(
            f"{len(checked)} parts in one call; name at most {PARTS_MAX}, the rest in another"
        )
    for part in checked:
        topic_id, partition, offset, micro = part
        if not (
            topic_id in _topics
            and type(partition) is type(offset) is type(micro) is int
            and 0 <= partition <= PARTITION_MAX
            and 0 <= offset <= OFFSET_MAX
            and 0 <= micro <= CREDITS_MICRO_MAX
        ):
            _require_topic(part, topic_id)
            if not (
                type(partition) is type(offset) is type(micro) is int
                and 0 <= partition <= PARTITION_MAX
                and 0 <= offset <= OFFSET_MAX
                and 0 <= micro <= CREDITS_MICRO_MAX
            ):
                raise InvalidReservation(
                    f"{part!r}: partition and offset of an acknowledged event are not negative, and its "
                    f"micro-credits are from 0 to {CREDITS_MICRO_MAX}"
                )
    return checked


def wanted_checked(wanted: Mapping[str, Credits]) -> tuple[tuple[str, ...], Sequence[int]]:
    """Ids and micro-credits of many reservations, looked at by columns: one by one takes five times as long.

    Raises:
        InvalidReservation: as `id_checked` and `micro_of`.
    """
    if not wanted:
        return (), ()
    names = tuple(wanted)
    if set(map(type, wanted.values())) == {int}:
        amounts = cast("list[int]", list(wanted.values()))
        micros = [amount * MICRO for amount in amounts]
        if min(amounts) <= 0 or max(amounts) > WHOLE_CREDITS_MAX:
            micros = list(map(micro_of, amounts))
    else:
        micros = list(map(micro_of, wanted.values()))
    if not (
        set(map(type, names)) == {str}
        and all(names)
        and max(map(len, names)) <= _SURELY_SHORT
        and "".join(names).isascii()
    ):
        for name in names:
            id_checked("reservation_id", name)
    return names, micros


def is_plain(outcome: Outcome | None) -> bool:
    """Whether credits are set aside, and nothing else is to be said."""
    return isinstance(outcome, Reservation) and outcome.covered and not outcome.done


class SettledColumns(NamedTuple):
    """Many reservations, each settled with one part, all of one source partition."""

    source: tuple[str, int]
    offsets: Sequence[int]
    amounts: Sequence[int]


def settled_checked(settled: Mapping[str, Sequence[Part]]) -> SettledColumns | None:
    """Parts of many reservations, by columns, too; None where they don't fit into `SettledColumns`.

    Raises:
        InvalidReservation: as `parts_checked`.
    """
    try:
        topics, partitions, offsets, amounts = zip(*[part for (part,) in settled.values()], strict=True)
    except ValueError:  # none at all, or not one each
        pass
    else:
        if (
            topics.count(topics[0]) == partitions.count(partitions[0]) == len(topics)
            and topics[0] in _topics
            and type(partitions[0]) is int
            and set(map(type, offsets)) == set(map(type, amounts)) == {int}
            and 0 <= partitions[0] <= PARTITION_MAX
            and min(offsets) >= 0
            and min(amounts) >= 0
            and max(offsets) <= OFFSET_MAX
            and max(amounts) <= CREDITS_MICRO_MAX
        ):
            return SettledColumns((topics[0], partitions[0]), offsets, amounts)
    for parts in settled.values():
        parts_checked(parts)
    return None


def _require_topic(part: Part, topic_id: str) -> None:
    if not isinstance(topic_id, str) or not _TOPIC_ID.fullmatch(topic_id):
        raise InvalidReservation(f"{part!r}: a topic id has letters, digits, and . _ - only")
    if len(_topics) < TOPICS_MAX:
        _topics.add(topic_id)
