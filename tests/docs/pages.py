"""The project's Markdown pages, cut into what tests can hold against the code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "all_pages", "blocks_of", "code_of", "links_of"]

ROOT = Path(__file__).parents[2]
NOT_OURS = {".venv", ".git", ".pytest_cache", ".ruff_cache", ".mypy_cache", "dist", "build"}

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4}\S.*$", re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language and its text."""

    language: str
    text: str


def all_pages() -> list[Path]:
    """Every page, relative to the root."""
    pages = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(page for page in pages if not NOT_OURS & set(page.parts))


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found) for found in _FENCED.findall((ROOT / page).read_text())]


def code_of(page: Path) -> list[str]:
    """Everything on a page that is set as code: lines of blocks, and spans in the text."""
    text = (ROOT / page).read_text()
    blocks = [block for block in blocks_of(page) if block.language != "mermaid"]
    lines = [line for block in blocks for line in block.text.splitlines()]
    rest = _FENCED.sub("", text)
    return [line.strip() for line in [*lines, *_INDENTED.findall(rest)]] + _SPAN.findall(rest)


def links_of(page: Path) -> list[str]:
    """The targets of its links that are files of the project, without the part behind a #."""
    text = _FENCED.sub("", (ROOT / page).read_text())
    targets = [target.partition("#")[0] for target in _LINK.findall(text) if "://" not in target]
    return [target for target in targets if target]
