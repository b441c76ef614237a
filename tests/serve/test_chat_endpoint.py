"""Valid chat requests bypass FastAPI's routing; every response is the one that FastAPI's endpoint gives."""

import asyncio
import json
import logging

import pytest
from fastapi import APIRouter

from lilliput.serve.chat_endpoint import PATH, DirectChat
from tests.serve.fakes import ASK, FakeBackends, app, client

VOLATILE = {"seconds", "id", "created"}
JSON = {"content-type": "application/json"}
REQUESTS = {
    "plain": (JSON, ASK),
    "stream": (JSON, ASK | {"stream": True}),
    "charset": ({"content-type": "application/json; charset=utf-8"}, ASK),
    "vendor type": ({"content-type": "application/vnd.api+json"}, ASK),
    "other type": ({"content-type": "text/plain"}, ASK),
    "no type": ({}, ASK),
    "link": (JSON | {"x-lilliput-link": "poor"}, ASK),
    "unknown link": (JSON | {"x-lilliput-link": "5g"}, ASK),
    "long link": (JSON | {"x-lilliput-link": "5" * 41}, ASK),
    "battery": (JSON | {"x-lilliput-battery-percent": "1e1"}, ASK),
    "low battery": (JSON | {"x-lilliput-battery-percent": "-1"}, ASK),
    "no battery": (JSON | {"x-lilliput-battery-percent": "nan"}, ASK),
    "no cache": (JSON | {"cache-control": "no-store"}, ASK),
    "long cache control": (JSON | {"cache-control": "x" * 201}, ASK),
    "other model": (JSON, ASK | {"model": "gpt"}),
    "unknown field": (JSON, ASK | {"metadata": {}}),
    "tools": (JSON, ASK | {"tools": [{}]}),
    "no messages": (JSON, {"messages": []}),
    "float tokens": (JSON, ASK | {"max_tokens": 2.0}),
    "text tokens": (JSON, ASK | {"max_tokens": "2"}),
    "list": (JSON, [1]),
    "not json": (JSON, b"{"),
    "empty": (JSON, b""),
    "not UTF-8": (JSON, b'{"messages": "\xff"}'),
    "nested": (JSON, b"[" * 30_000),
    "infinity": (JSON, json.dumps(ASK).replace("}]", '}], "temperature": Infinity').encode()),
    "surrogate": (JSON, {"messages": [{"role": "user", "content": "\ud800"}]}),
    "twice": (JSON, json.dumps(ASK)[:-1].encode() + b', "max_tokens": 0, "max_tokens": 3}'),
}


def without_volatile(value):
    if isinstance(value, dict):
        return {key: without_volatile(inner) for key, inner in value.items() if key not in VOLATILE}
    return [without_volatile(inner) for inner in value] if isinstance(value, list) else value


def respond(headers, body):
    """Status, headers and body of the response, without what differs between two equal answers."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def run():
        async with client(app(FakeBackends())) as http:
            return await http.post(PATH, content=content, headers=headers)

    response = asyncio.run(run())
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line and line != "data: [DONE]"]
    kept = {
        name: value for name, value in response.headers.items() if name not in ("x-lilliput-seconds", "content-length")
    }
    return response.status_code, kept, [without_volatile(json.loads(line)) for line in lines]


@pytest.mark.parametrize("name", REQUESTS)
def test_response_equals_that_of_the_endpoint(monkeypatch, name):
    headers, body = REQUESTS[name]
    direct = respond(headers, body)
    monkeypatch.setattr(DirectChat, "_parse", lambda *_: None)
    assert direct == respond(headers, body)


@pytest.mark.parametrize("name", ["plain", "stream", "charset", "link", "battery", "no cache", "unknown field"])
def test_valid_request_bypasses_the_endpoint(monkeypatch, name):
    async def reject(*_):
        raise AssertionError("FastAPI's router was called")

    application = app(FakeBackends())
    monkeypatch.setattr(APIRouter, "__call__", reject)
    headers, body = REQUESTS[name]

    async def run():
        async with client(application) as http:
            return await http.post(PATH, json=body, headers=headers)

    assert asyncio.run(run()).status_code == 200


def test_client_that_leaves_within_its_body_is_no_error(caplog):
    sent = []

    async def run():
        messages = [
            {"type": "http.request", "body": b'{"mess', "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": headers}
        await app(FakeBackends())(scope, receive, send)

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert (sent, caplog.records) == ([], [])
