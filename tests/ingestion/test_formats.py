"""Every supported format becomes the same kind of conversation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lilliput.data.conversations import (
    Conversation,
    ExpectedAbstention,
    ExpectedCalls,
    ExpectedJson,
    ExpectedNumber,
    ExpectedParts,
    ExpectedReference,
    ExpectedText,
)
from lilliput.data.row_file import line_of
from lilliput.ingestion.intake import Intake
from lilliput.ingestion.raw_rows import without_nulls
from lilliput.ingestion.staging import stage

WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
MESSAGES = {
    "tools": [TOOL],
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
        {"role": "assistant", "content": "It rains."},
    ],
}
SHAREGPT = {
    "system": "Be brief.",
    "tools": json.dumps([WEATHER]),
    "conversations": [
        {"from": "human", "value": "Weather\nin Oslo?"},
        {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": {"city": "Oslo"}})},
        {"from": "observation", "value": "Rain"},
        {"from": "gpt", "value": "It rains."},
    ],
}
DEPRECATED = {
    "functions": [WEATHER],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather\nin Oslo?"},
        {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
        {"role": "function", "name": "get_weather", "content": "Rain"},
        {"role": "assistant", "content": "It rains."},
    ],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path: Path, *rows: dict[str, Any]) -> list[Conversation]:
    write(tmp_path / "rows.jsonl", list(rows))
    return [row for row in Intake("rows.jsonl", tmp_path).rows() if isinstance(row, Conversation)]


def said(row: Conversation) -> list[tuple[str, str, list[tuple[str, dict[str, Any]]]]]:
    return [(turn.role, turn.text, [(call.name, call.arguments) for call in turn.tool_calls]) for turn in row.messages]


@pytest.mark.parametrize("row", [MESSAGES, SHAREGPT, DEPRECATED], ids=["messages", "sharegpt", "functions"])
def test_a_tool_conversation_is_the_same_in_all_formats(tmp_path, row):
    (conversation,) = read(tmp_path, row)
    assert said(conversation) == [
        ("system", "Be brief.", []),
        ("user", "Weather\nin Oslo?", []),
        ("assistant", "", [("get_weather", {"city": "Oslo"})]),
        ("tool", "Rain", []),
        ("assistant", "It rains.", []),
    ]
    assert conversation.tools == (TOOL,)
    assert conversation.expectation == ExpectedReference(reference="It rains.")


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, [("user", "2 + 2?"), ("assistant", "4")]),
        (
            {
                "prompt": [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 2?"}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            [("system", "Count."), ("user", "2 + 2?"), ("assistant", "4")],
        ),
        ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, [("user", "Add.\n\n2 and 2"), ("assistant", "4")]),
        ({"instruction": "Add 2 and 2.", "input": "", "output": "4"}, [("user", "Add 2 and 2."), ("assistant", "4")]),
        (
            {"instruction": "And 3?", "output": "9", "system": "Square.", "history": [["2?", "4"]]},
            [("system", "Square."), ("user", "2?"), ("assistant", "4"), ("user", "And 3?"), ("assistant", "9")],
        ),
        (
            {"conversations": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
            [("user", "2 + 2?"), ("assistant", "4")],
        ),
    ],
)
def test_requests_and_answers_of_each_format(tmp_path, row, turns):
    (conversation,) = read(tmp_path, row)
    assert [(turn.role, turn.text) for turn in conversation.messages] == turns


def test_calls_that_follow_each_other_are_one_turn_of_sharegpt(tmp_path):
    call = {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": {"city": "Oslo"}})}
    turns = [{"from": "human", "value": "Oslo twice?"}, {"from": "gpt", "value": "Looking."}, call, call]
    (row,) = read(tmp_path, {"conversations": turns, "tools": json.dumps([WEATHER])})
    assert said(row)[1:] == [("assistant", "Looking.", [("get_weather", {"city": "Oslo"})] * 2)]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"text": "4", "aliases": ["four"]}, ExpectedText(text="4", aliases=("four",))),
        ({"contains": ["4"]}, ExpectedParts(contains=("4",))),
        ({"number": 4, "tolerance": 0.1}, ExpectedNumber(number=4.0, tolerance=0.1)),
        ({"fields": {"sum": 4}}, ExpectedJson(fields={"sum": 4})),
        ({"kind": "json", "schema": {"type": "object"}}, ExpectedJson(schema={"type": "object"})),
        ({"tool_calls": []}, ExpectedCalls(tool_calls=())),
        ({"abstain": True}, ExpectedAbstention()),
        ({"reference": "4"}, ExpectedReference(reference="4")),
        ('{"number": 4}', ExpectedNumber(number=4.0)),
    ],
)
def test_the_keys_of_an_expectation_tell_its_kind(tmp_path, stated, expected):
    (row,) = read(tmp_path, {"messages": [{"role": "user", "content": "2 + 2?"}], "expect": stated})
    assert row.expectation == expected


def test_the_order_of_functions_and_parameters_and_null_arguments_are_kept(tmp_path):
    parameters = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": ["string", "null"]}}}
    call = {"name": "f", "arguments": {"z": "1", "a": None}}
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [{"function": call}]}]
    write(tmp_path / "rows.jsonl", [{"messages": turns, "tools": [{"parameters": parameters, "name": "f"}]}] * 2)
    row = stage("rows.jsonl", tmp_path).rows[0]
    assert isinstance(row, Conversation)
    stored = json.loads(line_of(row, in_order=True))
    assert json.dumps(stored["tools"][0]["function"]) == json.dumps({"parameters": parameters, "name": "f"})
    assert json.dumps(stored["messages"][1]["tool_calls"][0]["arguments"]) == json.dumps(call["arguments"])


def test_parquet_rows_lose_the_nulls_that_arrow_adds(tmp_path):
    other = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    rows = [json.loads(json.dumps(MESSAGES)), other]
    rows[0]["messages"][1]["content"] = "Weather\nin Oslo?"  # a column has one type
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    padded = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()[1]
    assert padded["messages"][0]["tool_calls"] is None
    assert without_nulls(padded) == other
    tool, plain = Intake("rows.parquet", tmp_path).rows()
    assert isinstance(tool, Conversation) and isinstance(plain, Conversation)
    assert tool.tools == (TOOL,)
    assert said(tool)[2] == ("assistant", "", [("get_weather", {"city": "Oslo"})])
    assert said(plain) == [("user", "Hello", []), ("assistant", "Hi", [])]


def test_question_rows_may_come_from_parquet(tmp_path):
    rows = [{"id": f"q{n}", "question": f"What is {n}?", "answer": str(n), "group": f"g{n}"} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [(row.id, row.user_text) for row in stage("rows.parquet", tmp_path).rows] == [
        (f"q{n}", f"What is {n}?") for n in range(3)
    ]


def chat(text: str, answer: str = "Yes.", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **more}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?"},
        {"instruction": "2 + 2?"},
        {"messages": [{"role": "user", "content": "2 + 2?"}]},
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "five"}]},
    ],
)
def test_prompts_need_no_answer_and_lose_their_own(tmp_path, row):
    write(tmp_path / "rows.jsonl", [row])
    (prompt,) = stage("rows.jsonl", tmp_path, prompts=True).rows
    assert isinstance(prompt, Conversation)
    assert [(turn.role, turn.text) for turn in prompt.prompt] == [("user", "2 + 2?")]
    assert prompt.reference is not None
    assert prompt.reference.text == "…"


def test_a_folder_is_read_in_order_and_names_of_files_are_sides(tmp_path):
    write(tmp_path / "chats/train-0.jsonl", [chat("first"), chat("second")])
    write(tmp_path / "chats/deep/more.jsonl", [chat("third")])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat("last")]), tmp_path / "chats/test.parquet")
    (tmp_path / "chats/README.md").write_text("not data")
    rows = [*Intake("chats", tmp_path).rows()]
    assert [(row.user_text, row.split) for row in rows] == [
        ("third", None),
        ("last", "test"),
        ("first", "train"),
        ("second", "train"),
    ]


def test_a_row_s_own_split_comes_before_the_name_of_its_file(tmp_path):
    write(tmp_path / "chats/train.jsonl", [chat("first", split="test")])
    write(tmp_path / "chats/test.jsonl", [chat("second", split="train")])
    assert [row.split for row in Intake("chats", tmp_path).rows()] == ["train", "test"]


def test_names_of_files_are_sides_of_questions_too(tmp_path):
    for side in ("train", "test"):
        row = {"id": side, "question": "Why?", "answer": "So.", "group": side}
        write(tmp_path / f"chats/{side}.jsonl", [row])
    assert [(row.id, row.split) for row in Intake("chats", tmp_path).rows()] == [("test", "test"), ("train", "train")]


def test_names_of_files_are_no_sides_if_there_is_only_one_side(tmp_path):
    write(tmp_path / "chats/train-0.jsonl", [chat("first")])
    write(tmp_path / "chats/train-1.jsonl", [chat("second")])
    assert [row.split for row in Intake("chats", tmp_path).rows()] == [None, None]


def test_ids_follow_the_content_and_repeated_rows_are_counted(tmp_path):
    write(tmp_path / "rows.jsonl", [chat("a"), chat("b"), chat("a"), chat("a"), chat("c", id=7, group=1)])
    intake = Intake("rows.jsonl", tmp_path)
    ids = [row.id for row in intake.rows()]
    assert ids[2:] == [f"{ids[0]}-2", f"{ids[0]}-3", "7"]
    write(tmp_path / "rows.jsonl", [chat("b"), chat("a")])
    assert [row.id for row in Intake("rows.jsonl", tmp_path).rows()] == [ids[1], ids[0]]
    assert intake.report.derived == {"ids": 4, "groups": 4}
    assert intake.report.notes == {"rows that repeat another row": 2}


def test_the_report_counts_skipped_rows_by_reason_and_ignored_keys(tmp_path):
    rows = [
        {"instruction": "Add.", "output": "4", "source": "web"},
        {"instruction": "Add.", "output": " "},
        {"instruction": "Add."},
        {"instruction": "", "output": "4"},
        {"instruction": "x" * 400_001, "output": "4"},
    ]
    write(tmp_path / "rows.jsonl", rows)
    intake = Intake("rows.jsonl", tmp_path)
    assert len([*intake.rows()]) == 1
    summary = intake.report.summary
    assert (summary["format"], summary["rows"], summary["used"]) == ("Alpaca", 5, 1)
    assert summary["skipped"] == {
        "without an answer": {"rows": 2, "first": "rows.jsonl:2"},
        "with an empty user turn": {"rows": 1, "first": "rows.jsonl:4"},
        "longer than 400,000 characters": {"rows": 1, "first": "rows.jsonl:5"},
    }
    assert summary["ignored_keys"] == {"source": 1}
    assert "Alpaca rows, 5; 2 rows without an answer skipped (first: rows.jsonl:2)" in intake.report.text


def test_ignored_keys_of_turns_are_counted(tmp_path):
    row = chat("a")
    row["messages"][1]["weight"] = 0  # OpenAI's: do not learn this turn
    row["\x1b[2J"] = 1
    write(tmp_path / "rows.jsonl", [row])
    intake = Intake("rows.jsonl", tmp_path)
    assert len([*intake.rows()]) == 1
    assert intake.report.ignored_keys == {"messages[].weight": 1, r"\x1b[2J": 1}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("user", "Hi")], "without an answer"),
        ([("user", "Hi"), ("assistant", "")], "without an answer"),
        ([("user", "Hi"), ("assistant", ""), ("user", "Hello?"), ("assistant", "Yes")], "with an empty assistant turn"),
        ([("user", " "), ("assistant", "Yes")], "with an empty user turn"),
        ([("system", "Hi")], "without a user turn"),
        ([], "without a turn"),
    ],
)
def test_rows_that_are_no_examples_are_skipped_with_their_reason(tmp_path, turns, reason):
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    write(tmp_path / "rows.jsonl", [chat("a"), row])
    intake = Intake("rows.jsonl", tmp_path)
    assert len([*intake.rows()]) == 1
    assert intake.report.skipped == {reason: 1}


def test_a_row_whose_call_its_own_functions_forbid_is_skipped(tmp_path):
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [{"name": "get_weather"}]}]
    turns[1]["tool_calls"] = [{"function": {"name": "get_weather", "arguments": {"town": "Oslo"}}}]
    write(tmp_path / "rows.jsonl", [chat("a"), {"messages": turns, "tools": [TOOL]}])
    intake = Intake("rows.jsonl", tmp_path)
    assert len([*intake.rows()]) == 1
    assert intake.report.skipped == {"with a call that its `tools` forbid": 1}


def test_the_library_s_data_code_imports_nothing_heavy():
    heavy = {"torch", "transformers", "pandas", "numpy", "pyarrow", "datasets", "rensa"}
    code = "import sys, lilliput.ingestion.staging; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lilliput.ingestion.near_duplicates" in done.stdout.split()
    assert not heavy & {*done.stdout.split()}
