"""Requests and answers compared with the types of OpenAI's client: every nullable field, every kind of answer."""

import asyncio
import typing

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, completion_create_params
from openai.types.chat.chat_completion_assistant_message_param import ChatCompletionAssistantMessageParam
from openai.types.model import Model
from openai.types.shared.error_object import ErrorObject
from pydantic import TypeAdapter

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import FixedRouter, ThresholdRouter
from tests.serve.fakes import (
    ASK,
    MODEL,
    PROMPT_TOKENS,
    FakeBackends,
    FakeEmbedder,
    app,
    ask,
    client,
    completion,
    served,
    stream_events,
    stream_text,
)

BASE = ASK | {"model": "pocket"}
IMAGE = [{"type": "image_url", "image_url": {"url": "http://x"}}]
ALTERNATIVES = [{"token": token, "logprob": -0.1, "bytes": [76], "id": 7} for token in ("Lima", "Cusco")]


def admits(hint, value):
    while typing.get_origin(hint) in (typing.Annotated, typing.Required):
        hint = typing.get_args(hint)[0]
    return value in (hint, *typing.get_args(hint))


def nullable(kind):
    hints = typing.get_type_hints(kind, include_extras=False)
    return sorted(name for name, hint in hints.items() if admits(hint, type(None)))


NULLABLE = nullable(completion_create_params.CompletionCreateParamsNonStreaming)


def valid(body, kind=completion_create_params.CompletionCreateParams):
    TypeAdapter(kind, config={"arbitrary_types_allowed": True}).validate_python(body, strict=True)
    return body


def strictly(kind, body):
    """`body` in the client's type, with strict validation."""
    return kind.model_validate(body, strict=True)


def test_specification_has_the_known_nullable_fields():
    assert {"stream", "stop", "n", "seed", "max_tokens", "temperature", "logprobs", "stream_options"} <= set(NULLABLE)
    assert len(NULLABLE) > 20


@pytest.mark.parametrize("name", [*NULLABLE, "response_format", "tools", "tool_choice"])
def test_each_nullable_field_may_be_null(name):
    body = BASE | {name: None}
    [response] = ask(app(FakeBackends()), valid(body) if name in NULLABLE else body)
    assert response.status_code == 200, response.text
    strictly(ChatCompletion, response.json())


@pytest.mark.parametrize("name", nullable(ChatCompletionAssistantMessageParam))
def test_each_nullable_field_of_an_assistant_s_turn_may_be_null(name):
    turns = [*ASK["messages"], {"role": "assistant", "content": "Lima", name: None}, *ASK["messages"]]
    [response] = ask(app(FakeBackends()), valid(BASE | {"messages": turns}))
    assert response.status_code == 200, response.text


def test_turns_without_content_or_with_refusals_become_text():
    fake = FakeBackends()
    refusal = [{"type": "text", "text": "No: "}, {"type": "refusal", "refusal": "I may not."}]
    turns = [{"content": None}, {"content": None, "refusal": "Never."}, {"content": refusal}]
    messages = [*({"role": "assistant"} | turn for turn in turns), *ASK["messages"]]
    [response] = ask(app(fake), valid(BASE | {"messages": messages}))
    assert response.status_code == 200, response.text
    sent = [turn["content"] for turn in fake.requests["device"][0]["messages"] if turn["role"] == "assistant"]
    assert sent == ["", "Never.", "No: I may not."]


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": "none"},
        {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"tool_choice": "auto"},
        {"modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"seed": -1},
        {"seed": 2**40},
        {"logprobs": False},
        {"user": "x", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
    ],
    ids=lambda more: "-".join(more),
)
def test_requests_for_text_only_are_answered(more):
    [response] = ask(app(FakeBackends()), valid(BASE | more))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "system", "content": [{"type": "refusal", "refusal": "x"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "messages"),
        ({"n": 2}, "n"),
        ({"stop": [""] * 5}, "stop"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_fields_are_named_in_the_error(more, param):
    [response] = ask(app(FakeBackends()), BASE | more)
    assert response.status_code == 400
    error = strictly(ErrorObject, response.json()["error"])
    assert (error.type, error.param) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (IMAGE, "messages.0.content.0: Input tag 'image_url' found"),
        ([], "messages.0.content: List should have at least 1 item"),
        ("x" * 32769, "messages.0.content: String should have at most 32768 characters"),
        (5, "messages.0.content: Input should be a valid string"),
    ],
    ids=lambda value: "",
)
def test_error_of_a_union_field_is_that_of_the_sent_type(content, message):
    [response] = ask(app(FakeBackends()), {"messages": [{"role": "user", "content": content}]})
    assert response.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("body", "sent_as", "message"),
    [
        (b'{"messages":', "application/json", "body: not JSON, from character 12 on"),
        (b'{"messages":[{"role":"user","content":"x"}]}', "text/plain", "body: send JSON, with Content-Type:"),
    ],
)
def test_error_of_an_invalid_json_body_names_no_field(body, sent_as, message):
    async def run():
        async with client(app(FakeBackends())) as http:
            return await http.post("/v1/chat/completions", content=body, headers={"Content-Type": sent_as})

    response = asyncio.run(run())
    error = strictly(ErrorObject, response.json()["error"])
    assert (response.status_code, error.param) == (400, None)
    assert error.message.startswith(message)


def test_empty_stop_texts_are_dropped(tmp_path):
    cache, fake = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10), FakeBackends()
    bodies = [BASE | {"stop": stop} for stop in ("", [], [""], None)]
    responses = ask(app(fake, cache=cache), *bodies)
    assert [response.status_code for response in responses] == [200] * 4
    assert ["stop" in body for body in fake.requests["device"]] == [False]
    ask(app(fake), BASE | {"stop": ["", "x"]})
    assert fake.requests["device"][-1]["stop"] == ["x"]


def test_head_requests_and_trailing_slash():
    with served(app(FakeBackends())) as url, httpx.Client(base_url=url) as http:
        for path in ("/health", "/v1/models", "/v1/models/pocket"):
            response = http.head(path)
            assert (response.status_code, response.content) == (200, b"")
        assert http.head("/v1/models/gpt-4").status_code == 404
        assert http.get("/v1/models/").json() == http.get("/v1/models").json()


def test_seeds_map_to_values_that_llama_cpp_does_not_randomize():
    fake = FakeBackends()
    ask(app(fake), BASE | {"seed": -1}, BASE | {"seed": 2**32 - 1}, BASE | {"seed": 5})
    assert [body["seed"] for body in fake.requests["device"]] == [2**32 - 2, 0, 5]


def test_model_list_and_unknown_model():
    application = app(FakeBackends())
    [listed], [found] = ask(application, path="/v1/models"), ask(application, path="/v1/models/pocket")
    assert [strictly(Model, model) for model in listed.json()["data"]] == [strictly(Model, found.json())]
    for response in (*ask(application, path="/v1/models/gpt-4/turbo"), *ask(application, BASE | {"model": "gpt-4"})):
        assert response.status_code == 404
        error = strictly(ErrorObject, response.json()["error"])
        assert (error.code, error.param) == ("model_not_found", "model")
        assert "'pocket' is" in error.message


def answers_by_origin(tmp_path, body):
    """The responses to `body` by device, server, cascade, fallback, and by an exact and a semantic cache hit."""
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, -2.0, 10)
    cached = app(FakeBackends(), cache=cache)
    other = {"messages": [{"role": "user", "content": "Which city is the capital of Peru?"}]}
    first, exact, semantic = ask(cached, body, body, body | other)
    assert [r.headers["x-lilliput-place"] for r in (first, exact, semantic)] == ["device", "cache", "cache"]
    return {
        "device": first,
        "exact hit": exact,
        "semantic hit": semantic,
        "server": ask(app(FakeBackends(), FixedRouter("server")), body)[0],
        "cascade": ask(app(FakeBackends(), ThresholdRouter(0.5)), body)[0],
        "fallback": ask(app(FakeBackends(server=httpx.Response(500)), FixedRouter("server")), body)[0],
    }


def test_complete_answers_match_the_client_s_type_and_have_usage(tmp_path):
    for who, response in answers_by_origin(tmp_path, BASE).items():
        answer = strictly(ChatCompletion, response.json())
        assert answer.choices[0].finish_reason == "stop", who
        assert answer.choices[0].logprobs is None, who
        words = 3 if who == "server" else 1
        prompt = 7 if who == "semantic hit" else PROMPT_TOKENS  # another wording: counted again
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, words + 1), who
        assert answer.usage.total_tokens == prompt + words + 1, who


@pytest.mark.parametrize("wanted", [True, False, None])
def test_streams_match_the_client_s_type_and_have_usage_on_request(tmp_path, wanted):
    options = None if wanted is None else {"include_usage": wanted}
    for who, response in answers_by_origin(tmp_path, BASE | {"stream": True, "stream_options": options}).items():
        *chunks, done = stream_events(response)
        assert done == "[DONE]", who
        read = [strictly(ChatCompletionChunk, chunk) for chunk in chunks]
        assert stream_text(chunks) == ("Lima, of course" if who == "server" else "Lima"), who
        usages = [chunk.usage for chunk in read]
        if wanted:
            assert all("usage" in chunk for chunk in chunks), who
            assert usages[:-1] == [None] * (len(read) - 1), who
            assert (read[-1].choices, usages[-1].completion_tokens) == ([], 4 if who == "server" else 2), who
        else:
            assert usages == [None] * len(read), who
        assert len({chunk.id for chunk in read}) == 1, who
        assert [chunk.choices[0].finish_reason for chunk in read if chunk.choices][-1] == "stop", who


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("router", [FixedRouter("device"), ThresholdRouter(0.5)], ids=["at once", "cascade"])
def test_log_probabilities_on_request_only(router, stream):
    known = completion("Lima")
    known["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = ALTERNATIVES

    def found(more):
        [response] = ask(app(FakeBackends(device=known), router), valid(BASE | {"stream": stream} | more))
        assert response.status_code == 200, response.text
        if not stream:
            return strictly(ChatCompletion, response.json()).choices[0].logprobs
        chunks = [strictly(ChatCompletionChunk, chunk) for chunk in stream_events(response)[:-1]]
        return next((chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs), None)

    assert found({}) is None
    assert found({"logprobs": False}) is None
    if stream and isinstance(router, FixedRouter):
        return  # the fake's stream has none
    for top, expected in ((None, []), (0, []), (1, ["Lima"]), (5, ["Lima", "Cusco"])):
        [token] = found({"logprobs": True, "top_logprobs": top}).content
        assert (token.token, [other.token for other in token.top_logprobs]) == ("Lima", expected)


def test_cascade_does_not_enlarge_the_response():
    known = completion("Lima")
    known["choices"][0]["logprobs"]["content"] *= 20
    sizes = [
        len(ask(app(FakeBackends(device=known), router), BASE)[0].content)
        for router in (FixedRouter("device"), ThresholdRouter(0.5))
    ]
    assert max(sizes) < 900
