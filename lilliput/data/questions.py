"""Questions and their answers: the one form that training text, calibration set and question set share."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lilliput.errors import DataError

ABSTENTION = "I don't know."

Text = Annotated[str, Field(pattern=r"\S")]


class Question(BaseModel):
    """A question about one entity.

    Attributes:
        id: unique within a file; what stands before the first `/` is its relation, by which questions are drawn evenly.
        choices: options of a multiple-choice question, the answer among them; empty where there is none.
        answer: the right answer; None where nobody can know (`answerable: false`).
        aliases: other right wordings.
        group: the entity it is about; no entity is both trained on and asked about.
        split: `train` or `test` to decide the group's fate by hand.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text
    question: Text
    choices: tuple[Text, ...] = ()
    answer: Text | None = None
    aliases: tuple[Text, ...] = ()
    answerable: bool = True
    group: Text
    split: Literal["train", "test"] | None = None

    @property
    def relation(self) -> str:
        """What is asked for, read off the id; `question` where the id does not say."""
        before, slash, _ = self.id.partition("/")
        return before if slash else "question"

    @model_validator(mode="after")
    def _is_consistent(self) -> Question:
        if self.answerable and self.answer is None:
            raise ValueError("an answerable question needs an `answer`; or say `answerable: false`")
        if not self.answerable and self.answer is not None:
            raise ValueError("an unanswerable question has no `answer`; remove it or say `answerable: true`")
        if len(set(self.choices)) != len(self.choices) or len(self.choices) == 1:
            raise ValueError("`choices` needs at least two different options, or none at all")
        if self.choices and self.answer and self.answer not in self.choices:
            raise ValueError(f"`choices` do not contain the answer {self.answer!r}")
        if twice := ({*self.choices} - {self.answer}) & {*self.aliases}:
            raise ValueError(f"{min(twice)!r} is a wrong choice and an alias of the answer; remove it from one")
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
        DataError: the file is missing or empty, a line is no question, or an id is there twice; with file and line.
    """
    try:
        # Not splitlines(): JSON strings may hold U+2028 and the like, which end no line of JSON Lines.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct `data.source` in params.yaml") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); correct `data.source` in params.yaml") from None
    questions: dict[str, Question] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        question = _parse(line, f"{path}:{number}")
        if question.id in questions:
            raise DataError(f"{path}:{number}: the id {question.id!r} was there before; make ids unique")
        questions[question.id] = question
    if not questions:
        raise DataError(f"{path}: empty question set; give at least one question a line (docs/data.md)")
    return list(questions.values())


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Writes `questions` as JSON Lines, the same bytes for the same questions."""
    rows = (question.model_dump(mode="json", exclude_none=True) for question in questions)
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def _parse(line: str, place: str) -> Question:
    try:
        return Question.model_validate_json(line)
    except ValidationError as error:
        raise DataError(f"{place}: {_explain(error)}; see docs/data.md for the form") from None


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "missing":
            return f"the key `{key}` is missing; add it"
        case "extra_forbidden":
            return f"unknown key `{key}`; remove it or correct its name"
        case "string_pattern_mismatch":
            return f"`{key}` is empty; fill it in"
    message = problem["msg"].removeprefix("Value error, ")
    return f"`{key}`: {message}" if key else message
