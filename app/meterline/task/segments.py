"""The files of one spool slot: how they are created, recovered after a crash, and forgotten.

00000000000000000007.segment   frames; the first one says which segment came before, and where it ended
drained                        "segment offset checksum": everything before it is in Kafka
00000000000000000007.torn      what was cut from a segment's end, for a person to look at; the newest are kept
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from meterline.task.errors import SpoolCorrupt
from meterline.task.frames import FRAME_HEAD_BYTES, build_frame, frame_bytes, read_frame, scan, unpack

__all__ = [
    "Frame",
    "Position",
    "Recovered",
    "create_segment",
    "frame_at",
    "has_segments",
    "read_marker",
    "recover",
    "segment_path",
    "sync_directory",
    "write_marker",
]

SUFFIX = ".segment"
MARKER = "drained"
DIGITS = 20
"""Names sort as numbers, up to the largest of 64 bits."""
TORN = ".torn"
TORN_MAX = 16
"""Kept in a slot. One is as large as a write that a crash broke off, mostly below 1 MiB; a person looks at
them after a crash, and a process that crashes more often has told so each time."""

log = logging.getLogger("meterline.task")


class Position(NamedTuple):
    """A place between two frames."""

    segment: int
    offset: int


class Frame(NamedTuple):
    """Records that became durable together.

    Attributes:
        end: the place behind them.
        size: bytes on the disk.
    """

    end: Position
    size: int
    records: list[bytes]


class Recovered(NamedTuple):
    """A slot as it was found.

    Attributes:
        begins: segment -> offset of its first frame with records, in order.
        ends: segment -> offset behind its last frame.
        drained: where the first frame that may not be in Kafka begins.
        newest: highest number a segment ever had here, as far as anybody can tell.
    """

    begins: dict[int, int]
    ends: dict[int, int]
    drained: Position
    newest: int


def segment_path(slot: Path, number: int) -> Path:
    """The file of a segment."""
    return slot / f"{number:0{DIGITS}}{SUFFIX}"


def has_segments(slot: Path) -> bool:
    """Whether something may wait here."""
    return any(True for _ in _numbers(slot))


def create_segment(slot: Path, number: int, before: Position, bytes_allocated: int) -> tuple[int, int]:
    """Make the next segment durable, with its room on the disk taken at once.

    Args:
        before: the segment before it and where that ends.
        bytes_allocated: writes up to here find their blocks even when the disk is full by then.

    Returns:
        The open file, and the offset of the first frame.

    Raises:
        OSError: the disk is full or broken; no file is left.
    """
    path = segment_path(slot, number)
    head = build_frame(number, 0, json.dumps({"version": 1, "before": before}).encode())
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, bytes_allocated)
        write_at(file, head, 0)
        os.fsync(file)
        sync_directory(slot)
    except BaseException:  # whatever it was: no half-made file stays
        os.close(file)
        path.unlink(missing_ok=True)
        raise
    return file, len(head)


def write_at(file: int, data: bytes, offset: int) -> None:
    """All of it, whatever the system takes at once."""
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], offset + written)


def sync_directory(directory: Path) -> None:
    """Make the names in it durable."""
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_marker(slot: Path, drained: Position) -> None:
    """Make durable that everything before this place is in Kafka. It never runs ahead of the truth."""
    text = f"{drained.segment} {drained.offset}"
    new = slot / f"{MARKER}.new"
    with new.open("w") as file:
        file.write(f"{text} {_checksum(text)}\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(slot / MARKER)
    sync_directory(slot)


def read_marker(slot: Path) -> Position:
    """The durable marker. An unreadable one counts as none: publishing again doubles nothing."""
    try:
        text, _, checksum = (slot / MARKER).read_text().strip().rpartition(" ")
    except FileNotFoundError:
        return Position(0, 0)
    segment, _, offset = text.partition(" ")
    if checksum != _checksum(text) or not segment.isdecimal() or not offset.isdecimal():
        log.warning("the marker in %s is unreadable; all there is published again", slot)
        return Position(0, 0)
    return Position(int(segment), int(offset))


def frame_at(slot: Path, place: Position) -> Frame:
    """The durable frame at a place.

    Raises:
        SpoolCorrupt: it is not whole any more.
        OSError: the disk.
    """
    path = segment_path(slot, place.segment)
    with path.open("rb") as file:
        file.seek(place.offset)
        head = file.read(FRAME_HEAD_BYTES)
        size = frame_bytes(head)
        data = head + file.read(max(0, size - FRAME_HEAD_BYTES))
    payload = read_frame(data, 0, place.segment, place.offset)
    if payload is None:
        raise SpoolCorrupt(
            f"the spool file {path} has changed at byte {place.offset} since it was written. Nothing was "
            "deleted, and nothing after it is published. Restore the file, or move its directory away."
        )
    return Frame(Position(place.segment, place.offset + size), size, unpack(payload))


def recover(slot: Path) -> Recovered:
    """Read every segment, cut what a crash tore, refuse what has changed since it was durable.

    Raises:
        SpoolCorrupt: nothing was deleted.
        OSError: the disk.
    """
    marker = read_marker(slot)
    numbers = sorted(_numbers(slot))
    for number in [n for n in numbers if n < marker.segment]:
        segment_path(slot, number).unlink()  # in Kafka; a crash came before the unlink
        numbers.remove(number)
    newest = max([marker.segment, *numbers])
    ends: dict[int, int] = {}
    for number in numbers:
        end = _recover_segment(slot, number, ends, is_last=number == numbers[-1])
        if end:
            ends[number] = end
    first = min(ends, default=newest)
    drained = marker if marker.segment == first else Position(first, 0)
    if first in ends and drained.offset > ends[first]:
        path = segment_path(slot, first)
        raise _corrupt(path, ends[first], f"it ends here, but was drained up to byte {drained.offset}")
    begins = {number: _head_bytes(slot, number) for number in ends}
    return Recovered(begins, ends, drained, newest)


def _recover_segment(slot: Path, number: int, ends: dict[int, int], *, is_last: bool) -> int:
    """Where a segment ends; 0: it never began, and is gone."""
    path = segment_path(slot, number)
    data = path.read_bytes()
    found = scan(data, number)
    if found.end == 0 and is_last and found.whole_again is None:
        _keep_torn(path, data[: found.tail], 0)
        path.unlink()
        sync_directory(slot)
        return 0
    if found.end:
        _check_predecessor(path, data, number, ends)
    if found.whole_again is not None:
        raise _corrupt(path, found.end, f"a whole frame follows at byte {found.whole_again}")
    if found.tail and not is_last:
        raise _corrupt(path, found.end, "later segments follow")
    if len(data) > found.end:
        _keep_torn(path, data[found.end : found.end + found.tail], found.end)
        with path.open("r+b") as file:
            file.truncate(found.end)
            os.fsync(file.fileno())
    return found.end


def _check_predecessor(path: Path, data: bytes, number: int, ends: dict[int, int]) -> None:
    """A segment's head tells of a segment before it that lost its end, or is missing altogether."""
    head = json.loads(read_frame(data, 0, number, 0) or b"{}")
    if head.get("version") != 1:
        raise _corrupt(path, 0, f"its head is not of this version: {head}")
    if not ends:
        return  # the oldest that is left: what came before it was drained
    before, end = head["before"]
    known = max(ends)
    if (before, end) != (known, ends[known]) or number != known + 1:
        raise _corrupt(
            segment_path(path.parent, known),
            ends[known],
            f"segment {known} ends here, but {path.name} follows segment {before} that ended at {end}",
        )


def _keep_torn(path: Path, tail: bytes, offset: int) -> None:
    """Bytes of a write that nobody was told of.

    Kept: of the very last frame nobody can tell a torn one from one that changed later.
    """
    if not tail:
        return
    kept = path.with_suffix(TORN)
    with kept.open("wb") as file:
        file.write(tail)
        os.fsync(file.fileno())
    log.warning("cut a torn write from %s at byte %d; it is kept in %s", path, offset, kept)
    for oldest in sorted(path.parent.glob(f"*{TORN}"))[:-TORN_MAX]:
        oldest.unlink()
        log.warning("removed %s: the newest %d torn writes of a slot are kept", oldest, TORN_MAX)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _corrupt(path: Path, offset: int, why: str) -> SpoolCorrupt:
    return SpoolCorrupt(
        f"the spool file {path} is broken at byte {offset}: {why}. It holds finished usage that may not be "
        "in Kafka yet. Nothing was deleted. Restore the file, or move its whole directory away to go on "
        "without it, and keep it: the frames before that byte are whole."
    )


def _head_bytes(slot: Path, segment: int) -> int:
    with segment_path(slot, segment).open("rb") as file:
        return frame_bytes(file.read(FRAME_HEAD_BYTES))


def _numbers(slot: Path) -> Iterator[int]:
    for path in slot.glob(f"*{SUFFIX}"):
        if path.stem.isdecimal():
            yield int(path.stem)
