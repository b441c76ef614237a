"""Questions with answers: the row format of training text, calibration set and question set."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from lilliput.data.row_file import RowFile, line_of, write_lines

ABSTENTION = "I don't know."


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must be a text that is not blank")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


class Question(BaseModel):
    """A question about one entity.

    Attributes:
        id: unique within a file; the part before the first `/` is the relation, by which samples are stratified.
        choices: options including the answer; empty if it is not a multiple-choice question.
        answer: the right answer; None if unanswerable.
        aliases: other right wordings.
        group: the entity; all its questions are on one side of the split.
        split: `train` or `test` to assign the group by hand.
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
        """The part of the id before the first `/`; `question` if there is none."""
        before, slash, _ = self.id.partition("/")
        return before if slash else "question"

    @property
    def user_text(self) -> str:
        """The question."""
        return self.question

    @property
    def answer_text(self) -> str:
        """The right answer; empty if there is none."""
        return self.answer or ""

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
    """Returns `text` without case, accents, punctuation, leading article and repeated spaces, for comparison."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c if c.isalnum() else " " for c in plain if not unicodedata.combining(c) and c not in "'’`")
    words = kept.split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in {"the", "a", "an"} else words)


def read_questions(path: Path) -> list[Question]:
    """Reads all questions of a JSON Lines file into memory.

    Raises:
        DataError: the file is missing or empty, a line is not a valid question, or an id is not unique.
    """
    return list(RowFile(path, Question).each_once())


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Writes `questions` as JSON Lines; the same questions give the same bytes."""
    write_lines(path, map(line_of, questions))
