"""JSON schemas that take llama.cpp too long are rejected before they reach it."""

import asyncio

import pytest

from lilliput.serve.schema_limits import MOST_ALTERNATIVES, MOST_DEPTH, MOST_PROPERTIES, check_schema
from tests.serve.fakes import ASK, FakeBackends, app, ask, client


def words(count):
    return [f"w{number}" for number in range(count)]


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def objects(count):
    return {"type": "object", "properties": {word: {} for word in words(count)}}


LARGEST = {
    "enum": {"enum": words(MOST_ALTERNATIVES)},
    "branches": {"anyOf": [{}] * MOST_ALTERNATIVES},
    "properties": objects(MOST_PROPERTIES),
    "required": {"required": words(MOST_PROPERTIES)},
    "depth": nested(MOST_DEPTH),
    "bytes": {"description": "x" * 8000},
    "reference": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
}
TOO_LARGE = {
    "enum": ({"enum": words(MOST_ALTERNATIVES + 1)}, "257 alternatives under enum; at most 256"),
    "two enums": ({"anyOf": [{"enum": words(200)}, {"enum": words(57)}]}, "257 alternatives under enum"),
    "branches": ({"items": {"oneOf": [{}] * 257}}, "257 alternatives under oneOf"),
    "properties": (objects(65), "65 properties under properties; at most 64"),
    "inner properties": ({"items": {"anyOf": [objects(40), objects(25)]}}, "65 properties under properties"),
    "definitions": ({"$defs": {word: {} for word in words(65)}}, "65 properties under"),
    "depth": (nested(MOST_DEPTH + 1), "nested deeper than 16"),
    "bytes": ({"description": "x" * 9000}, "bytes; at most 8192"),
    "reference": ({"$ref": "http://elsewhere/schema.json"}, "is an external reference"),
}


@pytest.mark.parametrize("name", LARGEST)
def test_schema_at_the_limit_is_accepted(name):
    assert check_schema(LARGEST[name]) is None  # above the limit it raises


@pytest.mark.parametrize("name", TOO_LARGE)
def test_schema_above_the_limit_error_names_the_size(name):
    schema, message = TOO_LARGE[name]
    with pytest.raises(ValueError, match=message.replace("$", r"\$")):
        check_schema(schema)


def test_only_small_schemas_reach_the_model():
    fake = FakeBackends()

    def form(schema):
        return ASK | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}

    good = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    without = ASK | {"response_format": {"type": "json_schema"}}
    responses = ask(app(fake), form({"enum": words(6000)}), form(good), without)
    assert [response.status_code for response in responses] == [400, 200, 400]
    assert "the schema has" in responses[0].json()["error"]["message"]
    assert responses[0].json()["error"]["param"] == "response_format"
    assert [body["response_format"]["json_schema"]["schema"] for body in fake.requests["device"]] == [good]


def test_deeply_nested_bodies_get_400():
    async def run():
        async with client(app(FakeBackends())) as http:
            deep = b'{"messages": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"
            schema = b'{"a":' * 9_000 + b"1" + b"}" * 9_000
            formed = b'{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema",'
            headers = {"content-type": "application/json"}
            bodies = (deep, formed + b'"json_schema":' + schema + b"}}")
            return [await http.post("/v1/chat/completions", content=body, headers=headers) for body in bodies]

    assert [response.status_code for response in asyncio.run(run())] == [400, 400]
