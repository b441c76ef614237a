"""Reads a source as normalised rows: recognises its format, converts, checks and counts every row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lilliput.data.conversations import Conversation
from lilliput.data.questions import Question
from lilliput.data.row_file import explain
from lilliput.data.rows import Row, normalised_line
from lilliput.ingestion import formats
from lilliput.ingestion.checks import check_calls, check_length, check_tools, check_turns, read_expectation
from lilliput.ingestion.formats import QUESTION, Format
from lilliput.ingestion.outcomes import MistakeError, Problems, Report, UnusableError
from lilliput.ingestion.raw_rows import RawRow
from lilliput.ingestion.reading import read_source

NO_GROUP = "-"  # of rows whose group is derived later
_TOO_DEEP = "nested too deeply; flatten it"


class Intake:
    """One pass over a source.

    Args:
        source: as in params.yaml.
        root: folder that a path is relative to.
        prompts: rows need no answer; one without gets a placeholder, which nobody may learn.
    """

    def __init__(self, source: str, root: Path, *, prompts: bool = False) -> None:
        self.report, self.problems = Report(source), Problems()
        self._source, self._root, self._prompts = source, root, prompts
        self._format: Format | None = None
        self._ids: set[str] = set()
        self._repeated: Counter[str] = Counter()
        self._splits: dict[str, str] = {}

    def rows(self) -> Iterator[Row]:
        """Yields the rows of `lines`."""
        return (row for row, _ in self.lines())

    def lines(self) -> Iterator[tuple[Row, bytes]]:
        """Yields the usable rows and their normalised lines; a row without a group has the group NO_GROUP.

        Raises:
            DataError: after the last row, with all mistakes; or the source has no usable row or cannot be read.
            SourceError: the hub's dataset cannot be fetched.
        """
        for raw in read_source(self._source, self._root):
            self.report.read += 1
            try:
                row = self._row(raw)
                line = _encoded(row)
            except MistakeError as error:
                self.problems.add(raw.place, str(error))
            except RecursionError:
                self.problems.add(raw.place, _TOO_DEEP)
            except UnusableError as reason:
                self.report.skip(raw.place, str(reason))
            else:
                self.report.used += 1
                yield row, line
        self._require_rows()
        self.problems.require_none()

    def _row(self, raw: RawRow) -> Row:
        value = raw.value
        if isinstance(value, str):
            raise MistakeError(value)
        form = self._known_format(value)
        if raw.split and value.get("split") is None:
            value = value | {"split": raw.split}
        row = self._question(value) if form is QUESTION else self._conversation(value, form)
        self._check_identity(row)
        return row

    def _known_format(self, value: dict[str, Any]) -> Format:
        """Returns the format of the row, which is that of the rows before it."""
        form = formats.detect(value)
        if form is None:
            raise MistakeError(formats.remedy(value))
        if self._format is None:
            self._format, self.report.format = form, form.name
        if form.name != self._format.name:
            raise MistakeError(
                f"a {form.name} row after {self._format.name} rows; use one format, and one source for each format"
            )
        return form

    def _question(self, value: dict[str, Any]) -> Question:
        try:
            return Question.model_validate_json(formats.json_text(value, "row"))
        except ValidationError as error:
            raise MistakeError(explain(error)) from None

    def _conversation(self, value: dict[str, Any], form: Format) -> Conversation:
        self.report.ignored_keys.update(formats.ignored_keys(value, form))
        turns, tools = formats.convert(form.turns(value)), formats.tools_of(value)
        check_length(turns, tools)
        check_tools(tools)
        expected = read_expectation(value.get("expect"), tools)
        if self._prompts:
            turns = _with_placeholder(turns)
        check_turns(turns, has_expectation=expected is not None)
        identity, group = _name(value.get("id"), "id"), _name(value.get("group"), "group")
        fields: dict[str, Any] = {
            "id": identity or self._derived_id([turns, tools]),
            "messages": turns,
            "tools": tools,
            "expect": expected,
            "group": group or NO_GROUP,
            "split": value.get("split"),
        }
        try:
            row = Conversation.model_validate(fields)
        except ValidationError as error:
            raise MistakeError(explain(error)) from None
        check_calls(row)
        self._count(row, group)
        return row

    def _derived_id(self, content: Any) -> str:
        """Returns an id from the content; further rows with the same content get a number."""
        text = json.dumps(content, ensure_ascii=True)
        identity = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.report.derived["ids"] += 1
        if identity not in self._ids:
            return identity
        self.report.notes["rows that repeat another row"] += 1
        self._repeated[identity] += 1
        return f"{identity}-{self._repeated[identity] + 1}"

    def _check_identity(self, row: Row) -> None:
        if row.id in self._ids:
            raise MistakeError(f"the id {row.id!r} occurs twice; make ids unique")
        self._ids.add(row.id)
        if row.group != NO_GROUP and row.split and self._splits.setdefault(row.group, row.split) != row.split:
            raise MistakeError(f"group {row.group!r} is in both splits; give all its rows the same `split`")

    def _count(self, row: Conversation, group: str | None) -> None:
        if group is None:
            self.report.derived["groups"] += 1
        if not row.tools and any(turn.tool_calls for turn in row.messages):
            self.report.notes["rows that call functions without `tools`"] += 1

    def _require_rows(self) -> None:
        if not self.report.used and not self.problems.total:
            skipped = ", ".join(f"{count} {reason}" for reason, count in self.report.skipped.items())
            self.problems.add(
                self._source, f"no usable row{f' (skipped: {skipped})' if skipped else ''}; give at least one row"
            )


def inspect(source: str, root: Path) -> Report:
    """Reads and checks all rows of `source`; writes nothing.

    Raises:
        DataError: with the first mistakes and their number, or the source has no usable row or cannot be read.
        SourceError: the hub's dataset cannot be fetched.
    """
    intake = Intake(source, root)
    for _ in intake.lines():
        pass
    return intake.report


def _with_placeholder(turns: list[formats.Turn]) -> list[formats.Turn]:
    """Returns the turns with an answer of the assistant at the end."""
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return [*asked, {"role": "assistant", "content": "…"}]


def _encoded(row: Row) -> bytes:
    try:
        return normalised_line(row).encode()
    except UnicodeEncodeError:
        raise MistakeError("half of a surrogate pair in a text; correct the text's encoding") from None


def _name(value: Any, key: str) -> str | None:
    """Returns an id or group as text; None if the row has none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise MistakeError(f"`{key}`: {value!r} is not a text; write one or leave it out")
    if (name := str(value)) == NO_GROUP:
        raise MistakeError(f"`{key}` is {name!r}; give it another name")
    return name
