"""A mutant: one safeguard taken out of a copy of the code, and the tests that must miss it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Edit", "Mutant", "StaleMutantError"]

UNIT_LIMIT_S = 300.0
"""Start, collection and a few hundred examples of a property: seconds, and on a busy machine minutes."""


class StaleMutantError(Exception):
    """The code has changed: a mutation no longer says what it replaces. The list must follow."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Exact text of one file, which must stand there once, and what takes its place."""

    file: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Change the file below `root`.

        Raises:
            StaleMutantError: the text isn't there, or more than once.
        """
        path = root / self.file
        text = path.read_text("utf-8") if path.is_file() else ""
        if (times := text.count(self.old)) != 1:
            raise StaleMutantError(f"{self.file} holds {times} times, not once:\n{self.old}")
        path.write_text(text.replace(self.old, self.new), "utf-8")


@dataclass(frozen=True, slots=True)
class Mutant:
    """Declared in `metering`, `billing` and `quota`.

    Attributes:
        removes: which safeguard, and what money it would cost.
        tests: node ids, as the ordinary suite has them.
        speaks_of: pattern that the failing assertion must match, its source or its message: the amounts it is
            about. Red for another reason is no kill.
        limit_s: of the whole run of its tests.
    """

    name: str
    removes: str
    edits: Sequence[Edit]
    tests: Sequence[str]
    speaks_of: str
    limit_s: float = UNIT_LIMIT_S

    def apply(self, root: Path) -> None:
        """Mutate the copy at `root`."""
        for edit in self.edits:
            edit.apply(root)
