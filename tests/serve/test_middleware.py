"""Access control of the gateway: token, host names, body size, rate limit and request validation."""

import asyncio
import json

import pytest

from lilliput.serve.gateway import Limits
from tests.serve.fakes import ASK, FakeBackends, app, ask, client


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "root", "content": "x"}]},
        ASK | {"max_tokens": 0},
        ASK | {"temperature": 9},
        ASK | {"tools": [{"type": "function"}]},
        ASK | {"n": 2},
        [],
    ],
)
def test_invalid_requests_get_400(body):
    [response] = ask(app(FakeBackends()), body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_unknown_fields_do_not_bypass_the_token_limit():
    fake = FakeBackends()
    body = ASK | {"max_completion_tokens": 9_999, "n_predict": 9_999, "logit_bias": [[1, 9]], "cache_prompt": False}
    ask(app(fake, limits=Limits(max_tokens=8)), body, ASK | {"max_tokens": 3})
    first, second = fake.requests["device"]
    assert (first["max_tokens"], second["max_tokens"]) == (8, 3)
    assert not first.keys() & {"n_predict", "logit_bias", "cache_prompt", "max_completion_tokens"}


def test_text_parts_and_developer_turns():
    fake = FakeBackends()
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of Peru?"}]
    body = {"messages": [{"role": "developer", "content": "Shout."}, {"role": "user", "content": parts}]}
    ask(app(fake), body)
    assert fake.requests["device"][0]["messages"] == [
        {"role": "system", "content": "Shout."},
        {"role": "user", "content": "What is the capital of Peru?"},
    ]


def test_declared_large_body_is_rejected_unread():
    [response] = ask(app(FakeBackends(), limits=Limits(body_bytes=100)), ASK | {"user": "x" * 200})
    assert response.status_code == 413


def test_chunked_large_body_is_rejected():
    read = []

    async def endless():
        for _ in range(1000):
            read.append(1)
            yield b" " * 50

    async def run():
        async with client(app(FakeBackends(), limits=Limits(body_bytes=100))) as http:
            return await http.post("/v1/chat/completions", content=endless())

    response = asyncio.run(run())
    assert response.status_code == 413
    assert len(read) < 10


def test_bearer_token_is_required_where_set():
    application = app(FakeBackends(), token="secret")
    assert ask(application, ASK)[0].status_code == 401
    assert ask(application, ASK, headers={"Authorization": "Bearer secre"})[0].status_code == 401
    assert ask(application, ASK, headers={"Authorization": "Bearer sécret".encode()})[0].status_code == 401
    assert ask(application, ASK, headers={"Authorization": "secret"})[0].status_code == 401
    assert ask(application, ASK, headers={"Authorization": "Basic secret"})[0].status_code == 401
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert ask(application, ASK, headers={"Authorization": f"{scheme} secret"})[0].status_code == 200
    for path, status in {"/health": 200, "/status": 401, "/metrics": 401, "/v1/models": 401}.items():
        assert ask(application, path=path)[0].status_code == status


def test_without_token_only_loopback_host_names_are_served():
    assert ask(app(FakeBackends()), ASK, headers={"Host": "evil.example:8080"})[0].status_code == 421
    assert ask(app(FakeBackends()), ASK, headers={"Host": "localhost.evil.example."})[0].status_code == 421
    for host in (
        "127.0.0.1:8080",
        "[::1]:8080",
        "localhost",
        "LocalHost",
        "LOCALHOST:8080",
        "localhost.",
        "localhost.:80",
    ):
        assert ask(app(FakeBackends()), ASK, headers={"Host": host})[0].status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_simple_cross_origin_requests_are_rejected(kind):
    fake = FakeBackends()
    body = json.dumps(ASK).encode()

    async def run():
        async with client(app(fake)) as http:
            headers = {"Origin": "http://evil.example"} | ({"Content-Type": kind} if kind else {})
            refused = await http.post("/v1/chat/completions", content=body, headers=headers)
            preflight = await http.options(
                "/v1/chat/completions",
                headers={
                    "Origin": "http://evil.example",
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": "content-type",
                },
            )
            return refused, preflight

    refused, preflight = asyncio.run(run())
    assert refused.status_code == 400
    assert not fake.requests["device"]
    assert not preflight.is_success
    for response in (refused, preflight):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_rate_limit_per_client():
    responses = ask(app(FakeBackends(), limits=Limits(requests_per_minute=3)), *[ASK] * 5)
    assert [response.status_code for response in responses] == [200, 200, 200, 429, 429]
    assert 1 <= int(responses[-1].headers["retry-after"]) <= 61


def test_questions_are_not_logged(caplog):
    caplog.set_level("DEBUG", logger="lilliput")
    ask(app(FakeBackends()), ASK)
    assert "device" in caplog.text
    assert "Peru" not in caplog.text
