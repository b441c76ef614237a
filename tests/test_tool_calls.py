"""Calls of functions in the forms that open models write, and their validity."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.data.conversations import ToolCall
from lilliput.tool_calls import begins_call, invalid_call, read_answer

CALL = {"name": "set_alarm", "arguments": {"time": "07:30", "days": ["mon"]}}
JSON = json.dumps(CALL)
EXPECTED = (ToolCall.model_validate(CALL),)
TOOL = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "parameters": {
            "type": "object",
            "properties": {
                "time": {"type": "string"},
                "days": {"type": "array", "items": {"type": "string", "enum": ["mon", "tue"]}},
            },
            "required": ["time"],
        },
    },
}


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"[{JSON}]",
        f"```json\n{JSON}\n```",
        f"<tool_call>\n{JSON}\n</tool_call>",
        f"<tool_call>{JSON}",  # cut before the closing tag
        f"[TOOL_CALLS] [{JSON}]",
        json.dumps({"name": "set_alarm", "parameters": CALL["arguments"]}),
        json.dumps({"type": "function", "function": CALL}),
        json.dumps({"name": "set_alarm", "arguments": json.dumps(CALL["arguments"])}),
        '[set_alarm(time="07:30", days=["mon"])]',
    ],
)
def test_a_call_is_read_in_every_form(text):
    answer = read_answer(text)
    assert (answer.text, answer.calls, answer.malformed) == ("", EXPECTED, False)


def test_arguments_of_the_python_form_are_those_of_json():
    (call,) = read_answer("[f(point=(1, 2.5), names={1: None})]").calls
    assert call.arguments == {"point": [1, 2.5], "names": {"1": None}}


def test_several_calls_keep_their_order_and_text_before_them_is_kept():
    other = json.dumps({"name": "stop", "arguments": {}})
    for text in (
        f"{JSON}\n{other}",
        f"[{JSON}, {other}]",
        f"<tool_call>{JSON}</tool_call>\n<tool_call>{other}</tool_call>",
    ):
        assert [call.name for call in read_answer(text).calls] == ["set_alarm", "stop"]
    answer = read_answer(f"I'll do that.\n<tool_call>{JSON}</tool_call>")
    assert (answer.text, answer.calls) == ("I'll do that.", EXPECTED)


@pytest.mark.parametrize("text", ["Paris", "", "{1, 2}", "[1, 2]", '{"answer": 3}', "f(1) is 2", "[see above]"])
def test_other_answers_are_text(text):
    answer = read_answer(text)
    assert (answer.text, answer.calls, answer.malformed) == (text, (), False)


@pytest.mark.parametrize(
    "text",
    [
        JSON[:-3],
        f"<tool_call>{JSON[:-3]}</tool_call>",
        f"<tool_call>{JSON}</tool_call><tool_call>nonsense</tool_call>",
        '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "not JSON"}',
        "[set_alarm('07:30')]",
        "[f(x=g())]",
        "[f(x={1})]",
        "[f(x=b'1')]",
        "[f(x=1e999)]",
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        "[TOOL_CALLS] none",
    ],
)
def test_what_begins_like_a_call_but_cannot_be_read_is_malformed_and_kept_as_text(text):
    answer = read_answer(text)
    assert (answer.text, answer.calls, answer.malformed) == (text.strip(), (), True)


@given(st.text(max_size=80), st.sampled_from(["", "<tool_call>", "[TOOL_CALLS]", '{"name": ', "[f(", "```json\n"]))
def test_no_text_is_an_error(text, opening):
    answer = read_answer(opening + text)
    assert answer.calls or answer.text == (opening + text).strip()


@pytest.mark.parametrize("opening", ["```", "```json", "<tool_call>", "[TOOL_CALLS]", "{", "["])
def test_long_runs_of_spaces_are_read_fast(opening):
    began = time.process_time()
    read_answer(f"{opening}{' ' * 4000}x{' ' * 4000}x")
    assert time.process_time() - began < 1.0


@given(
    st.sampled_from([JSON, f"[ {JSON}]", '[ set_alarm(time="7")]', '{"city": "Lima"}', "[see above]", "a = 1", "f(x)"]),
    st.sampled_from(["", "```", "```json\n", "```python\n", "``"]),
    st.integers(0, 60),
)
def test_a_call_is_expected_wherever_one_is_read(text, fence, length):
    whole = f"{fence}{text}{fence and chr(10) + '```'}"
    answer = read_answer(whole)
    if answer.calls or answer.malformed:
        assert begins_call(whole[:length]) is not False
    if begins_call(whole[:length]) is False:
        assert begins_call(whole) is False


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("set_alarm", {"time": "7"}, None),
        ("set_alarm", {"time": "7", "days": ["mon", "tue"]}, None),
        ("set_alarms", {"time": "7"}, "unknown"),
        ("set_alarm", {}, '"time" is a required property'),
        ("set_alarm", {"time": 7}, 'time: 7 is not of type "string"'),
        ("set_alarm", {"time": "7", "days": ["wed"]}, "days.0"),
        ("set_alarm", {"time": "7", "volume": 3}, "volume"),
    ],
)
def test_calls_are_checked_against_their_functions(name, arguments, fault):
    problem = invalid_call(ToolCall(name=name, arguments=arguments), [TOOL])
    assert (problem is None) if fault is None else fault in (problem or "")


def test_a_schema_may_allow_further_arguments():
    function = TOOL["function"] | {"parameters": TOOL["function"]["parameters"] | {"additionalProperties": True}}
    call = ToolCall(name="set_alarm", arguments={"time": "7", "volume": 3})
    assert invalid_call(call, [{"type": "function", "function": function}]) is None


def test_a_schema_cannot_open_files_or_addresses(tmp_path):
    secret = tmp_path / "schema.json"
    secret.write_text('{"type": "string"}')
    parameters = {"type": "object", "properties": {"time": {"$ref": secret.as_uri()}}}
    tool = {"type": "function", "function": {"name": "set_alarm", "parameters": parameters}}
    with pytest.raises(Exception, match="Retrieval is disabled"):
        invalid_call(EXPECTED[0], [tool])
