"""The corpus: training text, calibration set and question set. No entity is in both training and questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.artifacts import writing
from lilliput.data.questions import Question, QuestionFile, read_questions, write_questions
from lilliput.errors import DataError

FILES = ("train", "calibration", "questions")


@dataclass(frozen=True)
class Corpus:
    """Training text, calibration set (a sample of the training text) and question set (held-out entities).

    The training text may have millions of rows and is read row by row; params.yaml limits the size of the others.
    """

    train: Sequence[Question]
    calibration: list[Question]
    questions: list[Question]

    @property
    def summary(self) -> dict[str, Any]:
        """Per file: the number of rows, groups, unanswerable rows, and answerable rows by relation."""
        return {name: _counts(getattr(self, name)) for name in FILES}


def write_corpus(corpus: Corpus, directory: Path) -> None:
    """Writes the three files and summary.json into `directory`, atomically."""
    with writing(directory) as partial:
        for name in FILES:
            write_questions(partial / f"{name}.jsonl", getattr(corpus, name))
        text = json.dumps(corpus.summary, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        (partial / "summary.json").write_text(text, encoding="utf-8", newline="\n")


def read_corpus(directory: Path) -> Corpus:
    """Reads the corpus in `directory`.

    Raises:
        DataError: a file is missing or empty.
    """
    if missing := [name for name in FILES if not (directory / f"{name}.jsonl").is_file()]:
        raise DataError(f"{directory}: no corpus here ({missing[0]}.jsonl is missing); build it with the data stage")
    train, *others = (directory / f"{name}.jsonl" for name in FILES)
    return Corpus(QuestionFile(train), *(list(read_questions(path)) for path in others))


def _counts(questions: Iterable[Question]) -> dict[str, Any]:
    groups: set[str] = set()
    answerable: Counter[str] = Counter()
    rows = 0
    for question in questions:
        rows += 1
        groups.add(question.group)
        if question.answerable:
            answerable[question.relation] += 1
    return {
        "rows": rows,
        "groups": len(groups),
        "unanswerable": rows - answerable.total(),
        "answerable": dict(answerable),
    }
