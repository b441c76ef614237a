"""Questions with answers: the row format of training text, calibration set and question set."""

from __future__ import annotations

import json
import os
import unicodedata
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lilliput.data.jsonl import index_lines
from lilliput.data.lazy import Lazy
from lilliput.errors import DataError

ABSTENTION = "I don't know."

_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True)  # json.dumps would create an encoder per row

Text = Annotated[str, Field(pattern=r"\S")]


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


class QuestionFile(Sequence[Question]):
    """The questions of a JSON Lines file; each is read and validated on access.

    Keeps 16 bytes per question, where the objects would take 1.5 KiB.

    Raises:
        DataError: the file is missing or empty; on access, the line is not a valid question.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._starts, self._numbers = path, array("Q"), array("Q")
        try:
            with path.open("rb") as stream:
                for number, start in index_lines(stream, path):
                    self._starts.append(start)
                    self._numbers.append(number)
                self._size = stream.tell()
                self._file = os.dup(stream.fileno())
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; correct `data.source` in params.yaml") from None
        except OSError as error:
            message = f"{path}: cannot be read ({error.strerror}); correct `data.source` in params.yaml"
            raise DataError(message) from None
        weakref.finalize(self, os.close, self._file)
        if not self._starts:
            raise DataError(f"{path}: empty question set; give at least one question a line (docs/data.md)")

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> Question: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Question]: ...
    def __getitem__(self, place: int | slice) -> Question | Sequence[Question]:
        if isinstance(place, slice):
            return Lazy(self.__getitem__, range(*place.indices(len(self))))
        start = self._starts[place]
        end = self._starts[place + 1] if -1 != place < len(self) - 1 else self._size
        line, _, _ = os.pread(self._file, end - start, start).partition(b"\n")
        try:
            return Question.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{self._where(place)}: {_explain(error)}; see docs/data.md for the format") from None

    def each_once(self) -> Iterator[Question]:
        """Yields all questions and checks that ids are unique.

        Raises:
            DataError: a line is not a valid question, or an id is not unique; with file and line.
        """
        seen: set[str] = set()
        for place, question in enumerate(self):
            if question.id in seen:
                raise DataError(f"{self._where(place)}: the id {question.id!r} occurs twice; make ids unique")
            seen.add(question.id)
            yield question

    def _where(self, place: int) -> str:
        return f"{self._path}:{self._numbers[place]}"


def read_questions(path: Path) -> list[Question]:
    """Reads all questions of a JSON Lines file into memory.

    Raises:
        DataError: the file is missing or empty, a line is not a valid question, or an id is not unique.
    """
    return list(QuestionFile(path).each_once())


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Writes `questions` as JSON Lines; the same questions give the same bytes."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for question in questions:
            stream.write(_JSON.encode(question.model_dump(mode="json", exclude_none=True)) + "\n")


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
