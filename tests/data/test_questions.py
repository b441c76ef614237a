from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from lilliput.data.questions import Question, normalise, read_questions, write_questions
from lilliput.data.row_file import RowFile
from lilliput.errors import DataError

GOOD = {"id": "capital/France", "question": "Capital?", "choices": ["Paris", "Lyon"], "answer": "Paris", "group": "fr"}


def row(**changes: object) -> str:
    return json.dumps({key: value for key, value in (GOOD | changes).items() if value is not ...})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Invalid JSON"),
        (row(question=...), "the key `question` is missing"),
        (row(anwser="Paris"), "unknown key `anwser`"),
        (row(question="  "), "`question`: must be a text that is not blank"),
        (row(answer=None), "needs an `answer`"),
        (row(answerable=False), "unanswerable question has no `answer`"),
        (row(answer="Nice"), "do not contain the answer 'Nice'"),
        (row(choices=["Paris"]), "at least two different"),
        (row(choices=["Paris", "Lyon", "Lyon"]), "at least two different"),
        (row(aliases=["Lyon"]), "'Lyon' is a wrong choice and an alias"),
        (row(split="dev"), "`split`: Input should be 'train' or 'test'"),
        (row(), "the id 'capital/France' occurs twice"),
    ],
)
def test_a_bad_line_is_named_by_file_number_and_remedy(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{row()}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_questions(path)
    assert str(raised.value).startswith(f"{path}:3: ")
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_an_empty_question_set(tmp_path, text):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="empty question set"):
        read_questions(path)


def test_a_missing_file_and_another_encoding_are_named(tmp_path):
    with pytest.raises(DataError, match=r"mine\.jsonl: no such file; correct `data.source`"):
        read_questions(tmp_path / "mine.jsonl")
    (tmp_path / "mine.jsonl").write_bytes("Åbo".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 text \(at byte 0\)"):
        read_questions(tmp_path / "mine.jsonl")


def test_questions_make_a_round_trip_and_sorted_bytes(tmp_path):
    questions = [
        Question(**GOOD),
        Question(id="2", question="Line\u2028end?", answer="Åbo", aliases=("Turku",), group="fi", split="test"),
        Question(id="3", question="Nowhere?", answerable=False, group="x"),
    ]
    write_questions(tmp_path / "a.jsonl", questions)
    assert read_questions(tmp_path / "a.jsonl") == questions
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [*json.loads(lines[0])] == sorted(json.loads(lines[0]))
    assert "Åbo" in lines[1] and len(lines) == 4


def test_a_byte_order_mark_is_no_part_of_the_first_question(tmp_path):
    (tmp_path / "a.jsonl").write_text(row(), encoding="utf-8-sig")
    assert read_questions(tmp_path / "a.jsonl")[0].answer == "Paris"


def test_choices_that_differ_in_punctuation_alone_are_different():
    question = Question(id="1", question="2 − 7?", choices=("5", "-5"), answer="-5", group="sums")
    assert question.choices == ("5", "-5")


def test_a_question_never_changes():
    with pytest.raises(ValidationError):
        Question(**GOOD).answer = "Lyon"  # pyright: ignore[reportAttributeAccessIssue] (what is tested)


def test_the_relation_is_read_off_the_id():
    assert Question(**GOOD).relation == "capital"
    assert Question(**(GOOD | {"id": "17"})).relation == "question"


@pytest.mark.parametrize(
    ("text", "plain"),
    [("The Gambia", "gambia"), ("São  Tomé!", "sao tome"), ("N'Djamena", "ndjamena"), ("A", "a"), ("1.5", "1 5")],
)
def test_normalise(text, plain):
    assert normalise(text) == plain


def test_the_data_layer_imports_nothing_heavy():
    heavy = {"torch", "transformers", "pandas", "numpy"}
    code = "import sys, lilliput.recipes.build; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lilliput.recipes.facts" in done.stdout.split()
    assert not heavy & {*done.stdout.split()}


def test_a_question_file_is_a_sequence_read_on_access(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n\n \u00a0\n".join(row(id=f"{n}") for n in range(5)), encoding="utf-8")
    file = RowFile(path, Question)
    assert [question.id for question in file] == ["0", "1", "2", "3", "4"]
    assert (len(file), file[3].id, file[-1].id, file[-2].id) == (5, "3", "4", "3")
    assert [question.id for question in file[1:4][::2]] == ["1", "3"]
    with pytest.raises(IndexError):
        file[5]
    path.unlink()
    assert file[0].id == "0"
