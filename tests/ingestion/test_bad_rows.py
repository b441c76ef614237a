"""Every mistake in a source is named with file, line and remedy; all of them in one message."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lilliput.config import DataConfig
from lilliput.errors import ConfigError, DataError
from lilliput.ingestion.intake import inspect
from lilliput.ingestion.reading import read_source
from lilliput.params import load_params
from tests.conftest import PROJECT

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALLING = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "done"}
GOOD = {"messages": [USER, ASSISTANT]}

# 30 definitions, each with two references to the next one: 2**30 checks of one value.
DOUBLING = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/d0"}},
    "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)} | {"d30": {"type": "null"}},
}


def turns(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [*messages], **more}


def calling(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def tool(parameters: Any, name: Any = "f") -> dict[str, Any]:
    return turns(USER, ASSISTANT, tools=[{"type": "function", "function": {"name": name, "parameters": parameters}}])


def part(kind: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {}}]}


def expecting(expect: Any) -> dict[str, Any]:
    return turns(USER, expect=expect)


MISTAKES = {
    "assistant first": (turns(ASSISTANT, USER, ASSISTANT), "messages.0: the assistant speaks first; begin with"),
    "two users": (turns(USER, USER, ASSISTANT), "messages.1: two user turns in a row; join them"),
    "two assistants": (turns(USER, ASSISTANT, ASSISTANT), "messages.2: two assistant turns in a row; join them"),
    "late system": (
        turns(USER, {"role": "system", "content": "x"}, ASSISTANT),
        "messages.1: a system turn that is not",
    ),
    "unknown role": (turns({"role": "robot", "content": "x"}), "messages.0: unknown role 'robot'; use system"),
    "role that is a list": (turns({"role": ["user"], "content": "x"}), "messages.0: unknown role ['user']"),
    "no role": (turns({"content": "x"}), "messages.0: unknown role None"),
    "result without a call": (turns(USER, RESULT, ASSISTANT), "messages.1: a tool result without a call; put"),
    "result after text": (turns(USER, ASSISTANT, RESULT, ASSISTANT), "messages.2: a tool result without a call; add"),
    "more results than calls": (turns(USER, CALLING, RESULT, RESULT, ASSISTANT), "messages.3: a tool result without"),
    "result of another call": (
        turns(USER, CALLING, RESULT | {"tool_call_id": "2"}),
        "`tool_call_id` '2' is of no call",
    ),
    "user that calls": (turns(USER | {"tool_calls": CALLING["tool_calls"]}), "only the assistant calls functions"),
    "arguments that are not JSON": (turns(USER, calling("{city: Oslo}")), "'{city: Oslo}' is not JSON"),
    "arguments that are a list": (turns(USER, calling("[1]")), "arguments: a list; write an object, by parameter"),
    "arguments that are no number": (turns(USER, calling('{"a": NaN}')), "tools and calls: JSON has no such value"),
    "infinite number": (turns(USER, expect='{"number": 1e999}'), "expect: JSON has no such value"),
    "call without a name": (turns(USER, {"role": "assistant", "tool_calls": [{}]}), "no name of a function; add it"),
    "image": (turns(part("image_url"), ASSISTANT), "messages.0.content: a part of type 'image_url'; only text"),
    "audio": (turns(part("input_audio"), ASSISTANT), "a part of type 'input_audio'; only text is supported"),
    "number as content": (turns({"role": "user", "content": 4}, ASSISTANT), "messages.0.content: a int; write text"),
    "turns that are text": ({"messages": "Hi"}, "messages: a str; write a list of turns"),
    "turn that is text": (turns("Hi"), "messages.0: a str, not an object with `role` and `content`"),  # pyright: ignore
    "schema of another language": (tool({"type": "dict"}), "tools.0 (f): `parameters` is not the schema of an object"),
    "invalid schema": (tool({"type": "object", "properties": {"a": {"type": "str"}}}), "invalid schema: properties.a"),
    "schema elsewhere": (tool({"type": "object", "$ref": "http://x/y"}), "a reference to another document"),
    "unknown draft": (tool({"$schema": "http://x/y"}), "`$schema` 'http://x/y' is unknown; remove it"),
    "dangling reference": (tool({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}), "invalid schema"),
    "references that double": (tool(DOUBLING), "tools.0 (f): $ref: the references expand to too many schemas"),
    "expected schema with references that double": (expecting({"schema": DOUBLING}), "expect.schema: $ref: the ref"),
    "nameless function": (tool({}, name=None), "tools.0: no name; add it"),
    "function twice": (turns(USER, ASSISTANT, tools=[{"name": "f"}, {"name": "f"}]), "a second function 'f'"),
    "tools that are not JSON": (turns(USER, ASSISTANT, tools="get_weather"), "tools: 'get_weather' is not JSON"),
    "no expectation": (expecting({}), "expect: has no key; give exactly one kind: text, contains"),
    "two expectations": (expecting({"text": "a", "number": 1}), "has 'text', 'number'; give exactly one kind"),
    "misspelt expectation": (expecting({"contain": ["a"]}), "expect: has 'contain'; give exactly one kind"),
    "expectation of the wrong type": (
        expecting({"number": "four"}),
        "expect: `number`: Input should be a valid number",
    ),
    "expected unknown function": (expecting({"tool_calls": [{"name": "g"}]}), "the function 'g' is not in `tools`"),
    "expected invalid schema": (expecting({"schema": {"type": "str"}}), "expect: `schema` is not a valid JSON schema"),
    "another split": (turns(USER, ASSISTANT, split="dev"), "`split`: Input should be 'train' or 'test'"),
    "id that is a list": (turns(USER, ASSISTANT, id=[1]), "`id`: [1] is not a text"),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a preference (`chosen`, `rejected`); write"),
    "no format": ({"text": "once upon a time"}, "no known format (keys: `text`); write `messages`"),
    "no format, unprintable": ({"\x1b[2J\ud800": 1}, r"no known format (keys: `\x1b[2J\ud800`); write"),
    "mixed formats": ({"instruction": "a", "output": "b"}, "a Alpaca row after messages rows; use one format"),
    "half a surrogate pair": (turns({"role": "user", "content": "\ud800"}, ASSISTANT), "surrogate"),
}


def source(tmp_path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "mine.jsonl"


@pytest.mark.parametrize(("row", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_by_file_line_and_remedy(tmp_path, row, message):
    with pytest.raises(DataError) as raised:
        inspect(source(tmp_path, GOOD, "", row, GOOD), tmp_path)
    first, *rest = str(raised.value).split("\n")
    assert first.startswith("mine.jsonl:3: ")
    assert message in first
    assert rest == ["docs/data.md describes the formats"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not JSON"),
        ("[1]", "a list, not a JSON object"),
        ('{"messages": NaN}', "NaN is not a JSON value"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(GOOD)[:-1] + ', "tools": ' + "[" * 900 + "]" * 900 + "}", "write an object with `name`"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    with pytest.raises(DataError, match=r"mine\.jsonl:2: ") as raised:
        inspect(source(tmp_path, GOOD, line), tmp_path)
    assert message in str(raised.value)


def test_a_deeply_nested_schema_is_a_mistake_and_no_crash(tmp_path):
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    try:
        inspect(source(tmp_path, GOOD, tool(schema)), tmp_path)
    except DataError as error:
        assert "mine.jsonl:2: " in str(error)


def test_an_unknown_speaker_is_named(tmp_path):
    with pytest.raises(DataError, match=r"mine\.jsonl:1: conversations\.0: unknown speaker \['gpt'\]"):
        inspect(source(tmp_path, {"conversations": [{"from": ["gpt"], "value": "x"}]}), tmp_path)


def test_all_mistakes_are_counted_and_the_first_twenty_shown(tmp_path):
    with pytest.raises(DataError) as raised:
        inspect(source(tmp_path, GOOD, *[turns(ASSISTANT)] * 30), tmp_path)
    lines = str(raised.value).split("\n")
    assert [line.partition(": ")[0] for line in lines[:20]] == [f"mine.jsonl:{n}" for n in range(2, 22)]
    assert lines[20] == "… and 10 more problems"


def test_all_mistakes_of_a_question_file_are_shown(tmp_path):
    question = {"id": "1", "question": "Why?", "answer": "So.", "group": "g"}
    rows = [question, question, question | {"id": "2", "answer": None}, {"question": "Who?"}]
    with pytest.raises(DataError) as raised:
        inspect(source(tmp_path, *rows), tmp_path)
    assert str(raised.value).split("\n")[:-1] == [
        "mine.jsonl:2: the id '1' occurs twice; make ids unique",
        "mine.jsonl:3: an answerable question needs an `answer`; or say `answerable: false`",
        "mine.jsonl:4: the key `id` is missing; add it",
    ]


def test_a_group_on_both_sides_and_an_id_twice_are_mistakes(tmp_path):
    rows = [
        turns(USER, ASSISTANT, group="a", split="train", id="x"),
        turns(USER, ASSISTANT, group="a", split="test", id="y"),
        turns(USER, ASSISTANT, id="x"),
    ]
    with pytest.raises(DataError) as raised:
        inspect(source(tmp_path, *rows), tmp_path)
    assert "mine.jsonl:2: group 'a' is in both splits" in str(raised.value)
    assert "mine.jsonl:3: the id 'x' occurs twice" in str(raised.value)


def test_a_source_without_a_usable_row_says_why(tmp_path):
    with pytest.raises(DataError, match=r"mine\.jsonl: no usable row \(skipped: 2 without an answer\)"):
        inspect(source(tmp_path, turns(USER), turns(USER)), tmp_path)
    with pytest.raises(DataError, match=r"mine\.jsonl: no usable row; give at least one row"):
        inspect(source(tmp_path), tmp_path)


def test_a_folder_without_data_and_a_damaged_file_are_named(tmp_path):
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats/notes.txt").write_text("no data")
    with pytest.raises(DataError, match=r"chats: no \.jsonl or \.parquet file in it"):
        inspect("chats", tmp_path)
    (tmp_path / "chats/a.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(DataError, match=r"chats/a\.parquet: not a Parquet file that can be read"):
        inspect("chats", tmp_path)


def test_a_value_of_parquet_that_json_does_not_have_is_a_mistake(tmp_path):
    when = datetime.datetime(2024, 1, 1)
    question = {"id": "1", "question": "Why?", "answer": "So.", "group": "g", "made": when}
    for row in (question, turns(USER, calling({"at": when}))):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
        with pytest.raises(DataError, match=r"rows\.parquet: row 1: .*JSON has no such value.*datetime"):
            inspect("rows.parquet", tmp_path)


def test_formats_may_not_be_mixed_in_a_folder_either(tmp_path):
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats/a.jsonl").write_text(json.dumps(GOOD) + "\n")
    table = pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b"}])
    pyarrow.parquet.write_table(table, tmp_path / "chats/b.parquet")
    with pytest.raises(DataError, match=r"chats/b\.parquet: row 1: a prompt/completion row after messages rows"):
        inspect("chats", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.csv", "neither a recipe"),
        ("", "`source` is empty"),
        (".", "`source` is empty"),
        ("hub:org/chats", "40 hex digits of a commit"),
        ("hub:org/chats@main", "40 hex digits of a commit"),
        (f"hub:org/chats@{'0' * 40}?part=a", "40 hex digits of a commit"),
    ],
)
def test_a_source_of_another_kind_is_rejected_with_the_settings(tmp_path, name, message):
    text = (PROJECT / "params.yaml").read_text().replace("source: corpora/world-facts.yaml", f'source: "{name}"')
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.parquet", "chats", "v1.2/", "/data/chats", f"hub:org/chats@{'0' * 40}?config=en&split=train_sft"],
)
def test_sources_of_the_supported_kinds_are_accepted(name):
    assert DataConfig.model_validate(load_params(PROJECT / "params.yaml").data.model_dump() | {"source": name})


def test_a_missing_source_is_named(tmp_path):
    for name in ("none.jsonl", "none"):
        with pytest.raises(DataError, match=f"{name}: no such file; correct `data.source`"):
            [*read_source(name, tmp_path)]
