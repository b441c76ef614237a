"""Who may pass the gateway's doors, with what, and how often."""

import asyncio
import json

import pytest

from lilliput.serve.gateway import Limits
from tests.serve.paper import ASK, Paper, app, ask, client


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
def test_what_is_no_request_gets_one_clear_error(body):
    [response] = ask(app(Paper()), body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_no_key_lifts_the_limit_of_tokens():
    paper = Paper()
    body = ASK | {"max_completion_tokens": 9_999, "n_predict": 9_999, "logit_bias": [[1, 9]], "cache_prompt": False}
    ask(app(paper, limits=Limits(max_tokens=8)), body, ASK | {"max_tokens": 3})
    first, second = paper.asked["device"]
    assert (first["max_tokens"], second["max_tokens"]) == (8, 3)
    assert not first.keys() & {"n_predict", "logit_bias", "cache_prompt", "max_completion_tokens"}


def test_text_in_parts_and_the_developer_s_word_are_understood():
    paper = Paper()
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of Peru?"}]
    body = {"messages": [{"role": "developer", "content": "Shout."}, {"role": "user", "content": parts}]}
    ask(app(paper), body)
    assert paper.asked["device"][0]["messages"] == [
        {"role": "system", "content": "Shout."},
        {"role": "user", "content": "What is the capital of Peru?"},
    ]


def test_too_large_a_body_is_refused_before_it_is_read():
    [response] = ask(app(Paper(), limits=Limits(body_bytes=100)), ASK | {"user": "x" * 200})
    assert response.status_code == 413


def test_too_large_a_body_is_refused_though_it_declares_no_length():
    read = []

    async def endless():
        for _ in range(1000):
            read.append(1)
            yield b" " * 50

    async def run():
        async with client(app(Paper(), limits=Limits(body_bytes=100))) as http:
            return await http.post("/v1/chat/completions", content=endless())

    response = asyncio.run(run())
    assert response.status_code == 413
    assert len(read) < 10


def test_beyond_loopback_a_token_is_asked():
    application = app(Paper(), token="secret")
    assert ask(application, ASK)[0].status_code == 401
    assert ask(application, ASK, headers={"Authorization": "Bearer secre"})[0].status_code == 401
    assert ask(application, ASK, headers={"Authorization": "Bearer sécret".encode()})[0].status_code == 401
    assert ask(application, ASK, headers={"Authorization": "secret"})[0].status_code == 401
    assert ask(application, ASK, headers={"Authorization": "Basic secret"})[0].status_code == 401
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert ask(application, ASK, headers={"Authorization": f"{scheme} secret"})[0].status_code == 200
    for path, status in {"/health": 200, "/status": 401, "/metrics": 401, "/v1/models": 401}.items():
        assert ask(application, path=path)[0].status_code == status


def test_without_a_token_no_other_name_leads_in():
    assert ask(app(Paper()), ASK, headers={"Host": "evil.example:8080"})[0].status_code == 421
    assert ask(app(Paper()), ASK, headers={"Host": "localhost.evil.example."})[0].status_code == 421
    for host in (
        "127.0.0.1:8080",
        "[::1]:8080",
        "localhost",
        "LocalHost",
        "LOCALHOST:8080",
        "localhost.",
        "localhost.:80",
    ):
        assert ask(app(Paper()), ASK, headers={"Host": host})[0].status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_web_page_may_send_unasked_is_no_request(kind):
    paper = Paper()
    body = json.dumps(ASK).encode()

    async def run():
        async with client(app(paper)) as http:
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
    assert not paper.asked["device"]
    assert not preflight.is_success
    for response in (refused, preflight):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_too_many_requests_of_one_client_are_put_off():
    responses = ask(app(Paper(), limits=Limits(requests_per_minute=3)), *[ASK] * 5)
    assert [response.status_code for response in responses] == [200, 200, 200, 429, 429]
    assert 1 <= int(responses[-1].headers["retry-after"]) <= 61


def test_nothing_that_was_asked_is_logged(caplog):
    caplog.set_level("DEBUG", logger="lilliput")
    ask(app(Paper()), ASK)
    assert "device" in caplog.text
    assert "Peru" not in caplog.text
