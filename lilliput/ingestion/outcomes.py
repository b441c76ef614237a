"""What can happen to a row: it is used, skipped and counted, or a mistake that ends the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lilliput.errors import DataError

SHOWN = 20  # problems in one message
_HEADINGS = 12  # keys that are listed in the report


class MistakeError(ValueError):
    """The row is wrong; the message says what and the remedy."""


class UnusableError(ValueError):
    """The row is no example, which is common; the message is the reason, e.g. `without an answer`."""


@dataclass
class Problems:
    """Mistakes in a source: the first ones, and how many there are."""

    total: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, place: str, message: str) -> None:
        """Counts a mistake at `place`, a file and line."""
        self.total += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{place}: {message}")

    def require_none(self) -> None:
        """Raises DataError with all mistakes, if there are any."""
        if not self.total:
            return
        more = [f"… and {self.total - len(self.shown)} more problems"] if self.total > len(self.shown) else []
        raise DataError("\n".join([*self.shown, *more, "docs/data.md describes the formats"]))


@dataclass
class Report:
    """What became of the rows of a source.

    Attributes:
        source: as named in params.yaml.
        format: of all rows.
        read: rows.
        used: rows.
        skipped: rows by reason.
        first_skipped: place of the first row by reason.
        ignored_keys: rows by key that no format has.
        notes: other counts.
        derived: how many ids and groups were derived.
    """

    source: str
    format: str = ""
    read: int = 0
    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)
    ignored_keys: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    derived: Counter[str] = field(default_factory=Counter)

    def skip(self, place: str, reason: str) -> None:
        """Counts a skipped row."""
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, place)

    @property
    def summary(self) -> dict[str, Any]:
        """The report for summary.json."""
        skipped = {
            reason: {"rows": count, "first": self.first_skipped[reason]} for reason, count in self.skipped.items()
        }
        return {
            "source": self.source,
            "format": self.format,
            "rows": self.read,
            "used": self.used,
            "skipped": skipped,
            "ignored_keys": dict(self.ignored_keys),
            "derived": dict(self.derived),
            "notes": dict(self.notes),
        }

    @property
    def text(self) -> str:
        """The report for the terminal, a line per sentence."""
        lines = [f"{self.source}: {self.format} rows, {self.read:,}{_parts(self._skipped())}"]
        if self.ignored_keys:
            lines.append(f"ignored keys: {_listed(self.ignored_keys)}")
        if self.derived:
            lines.append(f"derived: {_listed(self.derived)}")
        lines += [f"{name}: {count:,}" for name, count in self.notes.items()]
        return "\n".join(lines)

    def _skipped(self) -> list[str]:
        return [
            f"{count:,} row{'s' if count > 1 else ''} {reason} skipped (first: {self.first_skipped[reason]})"
            for reason, count in self.skipped.items()
        ]


def _parts(parts: list[str]) -> str:
    return "".join(f"; {part}" for part in parts)


def _listed(counts: Mapping[str, int]) -> str:
    items = sorted(counts.items(), key=lambda item: -item[1])
    more = f" and {len(items) - _HEADINGS} more" if len(items) > _HEADINGS else ""
    return ", ".join(f"{name} ({count:,})" for name, count in items[:_HEADINGS]) + more
