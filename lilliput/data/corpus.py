"""The corpus: training text, calibration set and question set. No group is in both training and questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lilliput.artifacts import writing
from lilliput.data.conversations import Conversation
from lilliput.data.row_file import write_lines
from lilliput.data.rows import Row, normalised_line, open_rows
from lilliput.errors import DataError

FILES = ("train", "calibration", "questions")


@dataclass(frozen=True)
class Corpus:
    """Training text, calibration set (a sample of the training text) and question set (held-out groups).

    The training text may have millions of rows and is read row by row; params.yaml limits the size of the others.

    Attributes:
        source: what became of the source's rows; None for a corpus that was read, and for questions.
        report: the same for people.
    """

    train: Sequence[Row]
    calibration: Sequence[Row]
    questions: Sequence[Row]
    source: dict[str, Any] | None = None
    report: str | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """Per file: the number of rows, groups, unanswerable rows, and answerable rows by relation."""
        counts: dict[str, _Counts] = {}
        for name in FILES:
            counts[name] = _Counts()
            for row in getattr(self, name):
                counts[name].add(row)
        return self.summarise(counts)

    def summarise(self, counts: dict[str, _Counts]) -> dict[str, Any]:
        """Returns the summary with these counts per file."""
        source = {} if self.source is None else {"source": self.source}
        return source | {name: counted.summary for name, counted in counts.items()}


def write_corpus(corpus: Corpus, directory: Path) -> dict[str, Any]:
    """Writes the three files and summary.json into `directory`, atomically; returns the summary."""
    counts = {name: _Counts() for name in FILES}
    with writing(directory) as partial:
        for name in FILES:
            write_lines(partial / f"{name}.jsonl", _lines(getattr(corpus, name), counts[name]))
        summary = corpus.summarise(counts)
        text = json.dumps(summary, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        (partial / "summary.json").write_text(text, encoding="utf-8", newline="\n")
    return summary


def read_corpus(directory: Path) -> Corpus:
    """Reads the corpus in `directory`.

    Raises:
        DataError: a file is missing or empty.
    """
    if missing := [name for name in FILES if not (directory / f"{name}.jsonl").is_file()]:
        raise DataError(f"{directory}: no corpus here ({missing[0]}.jsonl is missing); build it with the data stage")
    train, calibration, questions = (open_rows(directory / f"{name}.jsonl") for name in FILES)
    return Corpus(train, [*calibration.each_once()], [*questions.each_once()])


@dataclass
class _Counts:
    """Counts of the rows of one file."""

    rows: int = 0
    groups: set[str] = field(default_factory=set)
    answerable: Counter[str] = field(default_factory=Counter)
    expectations: Counter[str] = field(default_factory=Counter)
    with_tools: int = 0

    def add(self, row: Row) -> None:
        self.rows += 1
        self.groups.add(row.group)
        if row.answerable:
            self.answerable[row.relation] += 1
        if isinstance(row, Conversation):
            self.expectations[row.expectation.kind] += 1
            self.with_tools += bool(row.tools)

    @property
    def summary(self) -> dict[str, Any]:
        counts = {
            "rows": self.rows,
            "groups": len(self.groups),
            "unanswerable": self.rows - self.answerable.total(),
            "answerable": dict(self.answerable),
        }
        if self.expectations:
            counts |= {"expectations": dict(self.expectations), "with_tools": self.with_tools}
        return counts


def _lines(rows: Iterable[Row], counts: _Counts) -> Iterator[str]:
    for row in rows:
        counts.add(row)
        yield normalised_line(row)
