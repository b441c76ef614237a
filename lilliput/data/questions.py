"""Questions and their answers: the one form that training text, calibration set and question set share."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lilliput.errors import DataError

ABSTENTION = "I don't know."


class Question(BaseModel):
    """A question about one entity.

    Attributes:
        id: unique within a file.
        choices: options of a multiple-choice question, the answer among them; empty where there is none.
        answer: the right answer; None where nobody can know (`answerable: false`).
        aliases: other right wordings.
        group: the entity it is about; no entity is both trained on and asked about.
        split: `train` or `test` to decide the group's fate by hand.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    question: str
    choices: tuple[str, ...] = ()
    answer: str | None = None
    aliases: tuple[str, ...] = ()
    answerable: bool = True
    group: str
    split: Literal["train", "test"] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Question:
        if not self.question.strip():
            raise ValueError("`question` is empty")
        if self.answerable and not self.answer:
            raise ValueError("an answerable question needs an `answer`; or say `answerable: false`")
        if not self.answerable and self.answer:
            raise ValueError("an unanswerable question has no `answer`; remove it or say `answerable: true`")
        if self.choices and self.answer and self.answer not in self.choices:
            raise ValueError(f"`choices` do not contain the answer {self.answer!r}")
        if len({normalise(choice) for choice in self.choices}) != len(self.choices) or len(self.choices) == 1:
            raise ValueError("`choices` needs at least two different options, or none at all")
        return self


def normalise(text: str) -> str:
    """`text` without case, accents, punctuation, leading article and repeated spaces: what counts when comparing."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c if c.isalnum() else " " for c in plain if not unicodedata.combining(c) and c not in "'’`")
    words = kept.split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in {"the", "a", "an"} else words)


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON Lines file.

    Raises:
        DataError: the file is missing or empty, or a line is no question; file and line are named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct `data.source` in params.yaml") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    questions = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise DataError(f"{path}: an empty question set; give at least one question a line (docs/data.md)")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{path}: the id {question.id!r} is there twice; make ids unique")
        seen.add(question.id)
    return questions


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Writes `questions` as JSON Lines, the same bytes for the same questions."""
    rows = (question.model_dump(mode="json", exclude_none=True) for question in questions)
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _parse(line: str, place: str) -> Question:
    try:
        return Question.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise DataError(f"{place}: {key + ': ' if key else ''}{message}; see docs/data.md for the form") from None
