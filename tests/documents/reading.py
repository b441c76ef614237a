"""The commands and code blocks of README.md and docs/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = (PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md")))
_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: file and line of the fence.
        language: `sh`, `python`, `yaml`, …; empty for a drawing.
        text: the lines between the fences.
    """

    place: str
    language: str
    text: str

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands of a shell block. A command may span lines, as an open quotation mark does."""
        commands, begun = [], ""
        for line in self.text.splitlines(keepends=True):
            begun += line
            try:
                words = shlex.split(begun, comments=True)
            except ValueError:  # a quotation goes on
                continue
            if words:
                commands.append(begun.strip())
            begun = ""
        assert not begun, f"{self.place}: a quotation does not end: {begun}"
        return tuple(commands)


def name_of(document: Path) -> str:
    """The path of `document` in the project: two pages may have the same file name."""
    return str(document.relative_to(PROJECT))


def links(document: Path) -> list[str]:
    """The targets of the links of `document`, outside of code."""
    return _LINK.findall(_INLINE.sub("", _without_blocks(document)))


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of `document`."""
    return {anchor(title) for title in headings(document)}


def headings(document: Path, level: str = "#+") -> list[str]:
    """The titles of the headings of `document`, of all levels or of one, such as `##`."""
    return re.findall(rf"^{level} (.+)$", _without_blocks(document), re.MULTILINE)


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _without_blocks(document: Path) -> str:
    """The text of `document` with empty lines in place of its fenced blocks."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), document.read_text(encoding="utf-8"))


def blocks(document: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of `document`, of one `language` or of all."""
    text = document.read_text(encoding="utf-8")
    found = (
        Block(f"{name_of(document)}:{text.count(chr(10), 0, match.start()) + 1}", match[1], match[3])
        for match in _FENCE.finditer(text)
    )
    return [block for block in found if language in (None, block.language)]


def inline_commands(document: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each span of code in running text that starts one of our programs."""
    text = _without_blocks(document)
    for match in _INLINE.finditer(text):
        if re.match(r"(\w+=\S+ )*(python -m|make|python scripts/)\b", match[1]):
            yield f"{name_of(document)}:{text.count(chr(10), 0, match.start()) + 1}", match[1]
