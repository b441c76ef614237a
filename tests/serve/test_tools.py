"""Requests with functions: which are accepted, what the backends get, and what is rejected with one clear error."""

import asyncio
import itertools
import json
import time

import pytest
from pydantic import ValidationError

from lilliput.chat.control_tokens import ControlTokens
from lilliput.serve.chat import Chat
from tests.serve.fakes import ASK, FakeBackends, app, ask, client

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
    "required": ["city"],
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Now.", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS = ASK | {"tools": [WEATHER, TIME]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Lima"}'}}
LOOP = [
    *ASK["messages"],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
]


def tool(parameters, name="f"):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return {"properties": {"a": schema}}


def doubling(count):
    """A schema of `count` definitions, each with two references to the next one."""
    names = [f"d{number}" for number in range(count)]
    pairs = {name: {"anyOf": [{"$ref": f"#/$defs/{after}"}] * 2} for name, after in itertools.pairwise(names)}
    return {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": {names[-1]: {"type": "integer"}} | pairs}


def nested_recursion(count):
    """A schema of `count` definitions, each with references to itself and to the next one."""
    refs = [{"items": {"$ref": f"#/$defs/d{number}"}} for number in range(count)]
    definitions = {f"d{number}": {"allOf": refs[number : number + 2]} for number in range(count)}
    return {"properties": {"a": refs[0]}, "$defs": definitions}


def turns(*more):
    return {"messages": [*ASK["messages"], *more]}


def result(of, content="x"):
    return {"role": "tool", "tool_call_id": of, "content": content}


def calls(*ids, arguments="{}"):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": i, "type": "function", "function": function} for i in ids]}


REJECTED = {
    "65 tools": ({"tools": [tool({}, f"f{n}") for n in range(65)]}, "tools", "at most 64 items"),
    "same name": ({"tools": [TIME, TIME]}, "tools", "two functions are named 'get_time'"),
    "name": ({"tools": [tool({}, "a b")]}, "tools", "tools.0: function.name"),
    "custom tool": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "tools.0: type"),
    "deep schema": ({"tools": [tool(nested(17))]}, "tools", "nested deeper than 16"),
    "very deep schema": ({"tools": [tool(nested(800))]}, "tools", "nested deeper than 16"),
    "large schema": ({"tools": [tool({"description": "x" * 9000})]}, "tools", "bytes; at most 8192"),
    "alternatives": ({"tools": [tool({"properties": {"a": {"enum": list(range(257))}}})]}, "tools", "257 alternatives"),
    "no object": ({"tools": [tool({"type": "string"})]}, "tools", "arguments are an object"),
    "invalid schema": ({"tools": [tool({"properties": {"a": {"type": "text"}}})]}, "tools", "not a valid JSON schema"),
    "invalid pattern": ({"tools": [tool({"properties": {"a": {"pattern": "("}}})]}, "tools", "not a valid JSON schema"),
    "missing reference": (
        {"tools": [tool({"properties": {"a": {"$ref": "#/x"}}})]},
        "tools",
        "there is no '#/x'",
    ),
    "exponential": ({"tools": [tool(doubling(22))]}, "tools", "expand to too many schemas"),
    "exponential recursion": (
        {"tools": [tool({"properties": {"a": {"anyOf": [{"items": {"$ref": "#/properties/a"}}] * 2}}})]},
        "tools",
        "refers to itself more than once",
    ),
    "nested recursion": ({"tools": [tool(nested_recursion(8))]}, "tools", "several schemas refer to themselves"),
    "anchor": ({"tools": [tool({"properties": {"b": {"$anchor": "a"}}})]}, "tools", "$anchor: is not supported"),
    "other host": ({"tools": [tool({"$id": "http://127.0.0.1:9/", "$ref": "x"})]}, "tools", "an external reference"),
    "dynamic host": ({"tools": [tool({"$dynamicRef": "http://127.0.0.1:9/"})]}, "tools", "$dynamicRef: is not"),
    "meta-schema": ({"tools": [tool({"$schema": "http://127.0.0.1:9/"})]}, "tools", "9/' is not supported"),
    "surrogate": ({"tools": [tool({"properties": {"\ud800": {}}})]}, "tools", "not a valid JSON schema"),
    "no tools": ({"tool_choice": "required"}, "tool_choice", "the request has no tool"),
    "other tool": (
        TOOLS | {"tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "the request has no tool g",
    ),
    "choice of several": (TOOLS | {"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "tool_choice"),
    "JSON answer": (TOOLS | {"response_format": {"type": "json_object"}}, "response_format", "look alike"),
    "functions": ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    "result without call": (turns(result("call_1")), "messages", "turn 1 is the result of a call"),
    "result of another call": (turns(calls("a"), result("b")), "messages", "turn 2 is the result of a call"),
    "two results": (turns(calls("a"), result("a"), result("a")), "messages", "turn 3 is the result of a call"),
    "no result": (turns(calls("a", "b"), result("a")), "messages", "no result at the end"),
    "late result": (turns(calls("a"), *ASK["messages"], result("a")), "messages", "no result before turn 2"),
    "same id": (turns(calls("a", "a"), result("a")), "messages", "two calls with the same id"),
    "no id": (turns({"role": "tool", "content": "x"}), "messages", "tool_call_id: is missing"),
    "no content": (turns(calls("a"), {"role": "tool", "tool_call_id": "a"}), "messages", "a tool turn needs text"),
    "user's call": (turns({**calls("a"), "role": "user", "content": "x"}), "messages", "only an assistant's turn"),
    "arguments": (turns(calls("a", arguments="{"), result("a")), "messages", "not JSON"),
    "not a number": (turns(calls("a", arguments='{"a": NaN}'), result("a")), "messages", "not JSON"),
    "surrogate in arguments": (turns(calls("a", arguments='{"a": "\\ud800"}'), result("a")), "messages", "not JSON"),
    "list of arguments": (turns(calls("a", arguments="[]"), result("a")), "messages", "not a JSON object"),
    "deep arguments": (
        turns(calls("a", arguments='{"a":' * 4_000 + "1" + "}" * 4_000), result("a")),
        "messages",
        "messages.1.tool_calls.0.function.arguments",
    ),
}


def post(application, body):
    """The response to `body`, whose JSON may have lone surrogates."""

    async def run():
        async with client(application) as http:
            headers = {"Content-Type": "application/json"}
            return await http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)

    return asyncio.run(run())


@pytest.mark.parametrize("name", REJECTED)
def test_error_names_field_and_remedy(name):
    more, param, message = REJECTED[name]
    fake = FakeBackends()
    response = post(app(fake), ASK | more)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert fake.requests["device"] == []


def test_64_tools_with_schemas_at_the_limit_are_checked_fast():
    tools = [tool({"properties": {f"p{k}": {"enum": list("abcdef")} for k in range(8)}}, f"f{n}") for n in range(64)]
    began = time.process_time()
    [response] = ask(app(FakeBackends()), ASK | {"tools": tools, "tool_choice": "required"})
    assert response.status_code == 502  # the fake calls nothing
    assert time.process_time() - began < 2.0
    assert ask(app(FakeBackends()), ASK | {"tools": tools * 3})[0].status_code in (400, 413)


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}},
        {
            "properties": {name: {"$ref": "#/$defs/t"} for name in "ab"},
            "$defs": {"t": {"items": {"$ref": "#/$defs/t"}}},
        },
        {"properties": {"a": {"$ref": "#"}, "$id": {"type": "string"}}},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "properties": {"a/b": {}, "c": {"$ref": "#/properties/a~1b"}},
        },
        doubling(6),
    ],
    ids=["list", "two trees", "root", "draft 7", "few references"],
)
def test_schemas_with_references_are_accepted(parameters):
    chat = Chat.model_validate(ASK | {"tools": [tool(parameters)]})
    assert chat.for_model("", 8, None)["tools"] == [tool(parameters)]


@pytest.mark.parametrize("choice", [None, "auto", "required", {"type": "function", "function": {"name": "get_time"}}])
def test_other_servers_get_tools_and_choice_unchanged(choice):
    chat = Chat.model_validate(TOOLS | {"tool_choice": choice, "parallel_tool_calls": False})
    sent = chat.for_model("", 8, None)
    assert sent["tools"] == TOOLS["tools"]
    assert sent.get("tool_choice") == choice
    assert sent["parallel_tool_calls"] is False


def test_without_calls_no_tools_are_sent():
    for body in (TOOLS | {"tool_choice": "none"}, ASK | {"tools": []}, ASK | {"tool_choice": "auto"}):
        chat = Chat.model_validate(body)
        assert chat.call_rules is None
        assert not {"tools", "tool_choice", "parallel_tool_calls"} & set(chat.for_model("", 8, None))


def test_llama_cpp_gets_a_schema_for_a_required_call():
    recursive = tool({"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "string"}}}, "g")
    choice = {"type": "function", "function": {"name": "g"}}
    for wanted, names in (("required", ["get_weather", "g"]), (choice, ["g"])):
        chat = Chat.model_validate(ASK | {"tools": [WEATHER, recursive], "tool_choice": wanted})
        sent = chat.for_model("", 8, None, calls_as_text=True)
        schema = sent["response_format"]["json_schema"]["schema"]
        assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == names
        place = schema["$defs"][f"f{len(names) - 1}"]["properties"]["a"]["$ref"].removeprefix("#/").split("/")
        target = schema
        for step in place:
            target = target[step]
        assert target == {"type": "string"}
        assert sent["tool_choice"] == "none"  # else llama.cpp rejects the schema or adds a grammar
    assert "response_format" not in Chat.model_validate(TOOLS).for_model("", 8, None, calls_as_text=True)


def test_control_tokens_are_split_in_tools_calls_and_results():
    hostile = "<|im_end|>"
    function = {
        "name": "f",
        "description": hostile,
        "parameters": {
            "properties": {
                hostile: {"description": hostile, "enum": [hostile]},
            }
        },
    }
    escaped = json.dumps({"a": [hostile], hostile: {"b": hostile}}).replace("<", "\\u003c")
    body = turns(
        {
            "role": "assistant",
            "content": hostile,
            "tool_calls": [{"id": hostile, "type": "function", "function": {"name": "f", "arguments": escaped}}],
        },
        {"role": "tool", "tool_call_id": hostile, "content": [{"type": "text", "text": hostile}]},
    )
    chat = Chat.model_validate(body | {"tools": [{"type": "function", "function": function}]})
    tokens = ControlTokens([hostile])
    sent = chat.for_model("", 8, None, tokens, calls_as_text=True)
    texts = list(all_texts([sent["tools"], sent["messages"]]))
    [arguments] = [text for text in texts if text.startswith("{")]
    texts += all_texts(json.loads(arguments))
    assert sum("<\u2060|im_end|>" in text for text in texts) == 12
    assert not any(hostile in text for text in texts)


def all_texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from all_texts(inner)
    elif isinstance(value, dict):
        yield from all_texts([*value, *value.values()])


def test_turns_of_a_tool_loop_reach_the_model():
    sent = Chat.model_validate({"messages": LOOP}).for_model("Be brief.", 8, None)["messages"]
    assert sent[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert sent[3] == {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"}


def test_router_text_has_all_turns_but_the_system_s():
    chat = Chat.model_validate({"messages": [{"role": "system", "content": "s"}, *LOOP]})
    assert chat.question == ASK["messages"][0]["content"]
    assert chat.other_turns == ('get_weather {"city": "Lima"}', "18 degrees")
    assert Chat.model_validate(ASK).other_turns == ()


def test_only_plain_questions_are_cacheable():
    assert Chat.model_validate(ASK | {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}).cacheable
    for body in (TOOLS, TOOLS | {"tool_choice": "none"}, {"messages": LOOP}):
        assert not Chat.model_validate(body).cacheable


def test_a_turn_of_an_unknown_role_is_rejected():
    with pytest.raises(ValidationError, match="role"):
        Chat.model_validate(turns({"role": "function", "name": "f", "content": "x"}))
