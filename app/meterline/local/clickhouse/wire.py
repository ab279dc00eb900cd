"""ClickHouse's native protocol in bytes: numbers, strings, and a reader that can hand out raw ranges."""

from __future__ import annotations

import struct
from collections.abc import Callable

__all__ = ["WireReader", "int32", "string", "varint"]

RECEIVE_BYTES = 1 << 20
"""One recv at most: a block of 10,000 events is about this large, so it takes few system calls."""

MESSAGE_BYTES_MAX = 1 << 30
"""A block beyond this is a broken length, not data: clickhouse-driver splits at a million rows."""

VARINT_BYTES_MAX = 10


def varint(value: int) -> bytes:
    """An unsigned LEB128 number."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def string(text: str) -> bytes:
    """A length-prefixed UTF-8 string."""
    data = text.encode()
    return varint(len(data)) + data


def int32(value: int) -> bytes:
    """A little-endian signed number of four bytes."""
    return struct.pack("<i", value)


class WireReader:
    """Keeps what it reads, so that a walked range can be passed on unchanged.

    `receive(count)` returns at most `count` bytes, none at the end: a socket's recv, a file's read. Every
    method raises EOFError at the end and ConnectionError when a length makes no sense.
    """

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self._receive = receive
        self._buffer = bytearray()
        self._position = 0

    def forget(self) -> None:
        """Drop what was consumed; positions returned before are invalid afterwards."""
        del self._buffer[: self._position]
        self._position = 0

    def mark(self) -> int:
        """Where the next byte is, for `since`."""
        return self._position

    def since(self, mark: int) -> bytes:
        """The bytes consumed since `mark`."""
        return bytes(memoryview(self._buffer)[mark : self._position])

    def varint(self) -> int:
        """An unsigned LEB128 number."""
        value = shift = 0
        for _ in range(VARINT_BYTES_MAX):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ConnectionError("a varint of more than 10 bytes")

    def byte(self) -> int:
        """One unsigned byte."""
        self._fill(self._position + 1)
        self._position += 1
        return self._buffer[self._position - 1]

    def uint64(self) -> int:
        """A little-endian number of eight bytes."""
        self.skip(8)
        return int.from_bytes(self._buffer[self._position - 8 : self._position], "little")

    def string(self) -> str:
        """A length-prefixed string."""
        length = self.varint()
        self.skip(length)
        return self._buffer[self._position - length : self._position].decode(errors="replace")

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        self._fill(self._position + count)
        self._position += count

    def skip_strings(self, count: int) -> None:
        """Pass over `count` length-prefixed strings. No calls in the loop: inserts spend their time here."""
        buffer, position = self._buffer, self._position
        filled = len(buffer)
        for _ in range(count):
            if position >= filled:
                self._fill(position + 1)
                filled = len(buffer)
            length = buffer[position]
            position += 1
            if length >= 0x80:
                self._position = position - 1
                length = self.varint()
                position = self._position
            position += length
        self._fill(position)
        self._position = position

    def _fill(self, end: int) -> None:
        """Receive until the buffer reaches `end`."""
        if end > MESSAGE_BYTES_MAX:
            raise ConnectionError(f"a message of more than {MESSAGE_BYTES_MAX} bytes")
        while len(self._buffer) < end:
            received = self._receive(RECEIVE_BYTES)
            if not received:
                raise EOFError
            self._buffer += received
