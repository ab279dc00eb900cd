"""Finds equal and contradicting events in a stream of any length, in constant memory."""

from __future__ import annotations

import sqlite3
from types import TracebackType
from typing import Self

from meterline.domain.events import UsageEvent, identity_hash, payload_digest

__all__ = ["SeenEvents"]

CACHE_KIB = 64 * 1024
"""About a million events stay in memory; SQLite moves what is beyond to a private temporary file."""


class SeenEvents:
    """The identity, payload and line of every event so far. A context manager: it owns a temporary file."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)  # "": private, on disk only when large
        self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute(
            "CREATE TABLE seen (identity BLOB PRIMARY KEY, digest BLOB, line INTEGER) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def note(self, event: UsageEvent, line: int) -> tuple[int, bool] | None:
        """Remember an event and the line it stands on.

        Returns:
            None: its identity is new. Otherwise the line of the first event of this identity, and whether the
            payloads are equal; the first stands.
        """
        identity = identity_hash(event.client_id, event.event_id).to_bytes(12, "big")
        digest = payload_digest(event).to_bytes(8, "big")
        added = self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (identity, digest, line))
        if added.rowcount:
            return None
        first_digest, first_line = self._db.execute(
            "SELECT digest, line FROM seen WHERE identity = ?", (identity,)
        ).fetchone()
        return first_line, first_digest == digest
