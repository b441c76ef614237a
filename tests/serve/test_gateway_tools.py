"""Function calls through the gateway, with scripted backends: the client's tool loop, routing, streams, metrics."""

import json
from typing import Literal

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client import generate_latest
from pydantic import BaseModel

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import FixedRouter, RoutingDecision, ThresholdRouter
from tests.serve.fakes import (
    ASK,
    MODEL,
    FakeBackends,
    FakeEmbedder,
    app,
    ask,
    called,
    completion,
    served,
    stream_events,
    stream_text,
)
from tests.serve.test_tools import LOOP, TIME, TOOLS, WEATHER

GOOD = '{"name": "get_weather", "arguments": {"city": "Lima"}}'
BAD = '{"name": "get_weather", "arguments": {"town": "Lima"}}'
TEXT = "It has 18 degrees in Lima."
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Cascade(ThresholdRouter):
    """Keeps confident answers of the device; the policy allows the edge server."""


def gateway(device, server=None, router=None, **more):
    """An application whose device is llama.cpp, and its backends."""
    fake = FakeBackends(device=device, server=server)
    application = app(fake, router or Cascade(0.5), **more)
    application.gateway.service.device.llama_cpp = True
    return application, fake


def answer(response):
    """Text, calls and finish reason of a complete or streamed answer, in the client's types."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        choice = ChatCompletion.model_validate(response.json(), strict=True).choices[0]
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]
        return choice.message.content, calls, choice.finish_reason
    *chunks, done = stream_events(response)
    assert done == "[DONE]", done
    read = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    choices = [chunk.choices[0] for chunk in read if chunk.choices]
    deltas = [delta for choice in choices for delta in choice.delta.tool_calls or ()]
    assert [delta.index for delta in deltas] == list(range(len(deltas)))
    calls = [(delta.function.name, json.loads(delta.function.arguments)) for delta in deltas]
    assert len({delta.id for delta in deltas}) == len(deltas)
    return stream_text(chunks) or None, calls, choices[-1].finish_reason


def device_of_a_loop(request):
    """Calls the function first, then answers with its result."""
    last = request["messages"][-1]
    return completion(f"It has {last['content']} in Lima." if last["role"] == "tool" else GOOD)


def weather(city: str, unit: str = "C") -> str:
    return f"{18 if unit == 'C' else 64} degrees" if city == "Lima" else "unknown"


@pytest.fixture(scope="module")
def client():
    application, fake = gateway(device_of_a_loop, router=FixedRouter("device"))
    with served(application) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        made.fake = fake
        yield made


def test_tool_loop_of_the_official_client(client):
    messages = list(ASK["messages"])
    for _ in range(4):
        reply = client.chat.completions.create(model="pocket", messages=messages, tools=[WEATHER, TIME])
        message = reply.choices[0].message
        if not message.tool_calls:
            break
        assert reply.choices[0].finish_reason == "tool_calls"
        messages.append(message)
        for call in message.tool_calls:
            content = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    assert message.content == TEXT
    sent = client.fake.requests["device"][-1]["messages"]
    assert [turn["role"] for turn in sent] == ["system", "user", "assistant", "tool"]
    assert sent[2]["tool_calls"][0]["id"] == sent[3]["tool_call_id"]


def test_streamed_tool_loop_of_the_official_client(client):
    messages = list(ASK["messages"])
    for _ in range(4):
        with client.chat.completions.stream(model="pocket", messages=messages, tools=[WEATHER]) as stream:
            kinds = {event.type for event in stream}
            message = stream.get_final_completion().choices[0].message
        if not message.tool_calls:
            break
        assert "tool_calls.function.arguments.done" in kinds
        messages.append(message)
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
            for call in message.tool_calls
        ]
    assert message.content == TEXT


def test_parsed_arguments_of_the_official_client(client):
    class GetWeather(BaseModel):
        city: str
        unit: Literal["C", "F"] | None = None

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    tool["function"]["parameters"]["required"] = ["city"]  # the client requires all
    reply = client.chat.completions.parse(model="pocket", messages=ASK["messages"], tools=[tool])
    [call] = reply.choices[0].message.tool_calls
    assert call.function.parsed_arguments == GetWeather(city="Lima")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("device", "more", "expected"),
    [
        (GOOD, {}, (None, [("get_weather", {"city": "Lima"})], "tool_calls")),
        (f"Let me look. {GOOD}", {}, (f"Let me look. {GOOD}", [], "stop")),  # JSON counts only at the beginning
        (f"Look: <tool_call>{GOOD}</tool_call>", {}, ("Look:", [("get_weather", {"city": "Lima"})], "tool_calls")),
        (f"{GOOD}\n{GOOD}", {"parallel_tool_calls": False}, (None, [("get_weather", {"city": "Lima"})], "tool_calls")),
        (GOOD, {"tool_choice": NAMED}, (None, [("get_weather", {"city": "Lima"})], "tool_calls")),
        (GOOD, {"tool_choice": "none"}, (GOOD, [], "stop")),
        (GOOD, {"tools": None}, (GOOD, [], "stop")),
        ("It is Lima.", {}, ("It is Lima.", [], "stop")),
    ],
    ids=["call", "text and JSON", "text and call", "one call", "named", "none", "no tools", "text"],
)
def test_answer_of_the_device(device, more, expected, stream):
    application, fake = gateway(completion(device), router=FixedRouter("device"))
    [response] = ask(application, TOOLS | {"stream": stream} | more)
    assert answer(response) == expected
    assert response.headers["x-lilliput-place"] == "device"
    assert ("tools" in fake.requests["device"][0]) == ("tools" not in more and more.get("tool_choice") != "none")


@pytest.mark.parametrize("stream", [False, True])
def test_invalid_call_goes_to_the_edge_server(stream):
    application, fake = gateway(completion(BAD), called(("get_weather", '{"city": "Lima"}')))
    [response] = ask(application, TOOLS | {"stream": stream})
    assert answer(response) == (None, [("get_weather", {"city": "Lima"})], "tool_calls")
    assert response.headers["x-lilliput-place"] == "server"
    assert response.headers["x-lilliput-reason"] == "the call of the device was invalid"
    [sent] = fake.requests["server"]
    assert (sent["tools"], sent["stream"]) == (TOOLS["tools"], stream)
    shown = generate_latest(application.gateway.registry).decode()
    assert 'lilliput_invalid_tool_calls_total{place="device"} 1.0' in shown
    assert 'lilliput_tool_calls_total{place="server"} 1.0' in shown


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("router", "server", "place"),
    [
        (FixedRouter("device"), called(("get_weather", '{"city": "Lima"}')), "device"),
        (Cascade(0.5), httpx.Response(500), "device"),
        (Cascade(0.5), httpx.Response(400, json={"error": {"message": "no tools"}}), "device"),
        (Cascade(0.5), called(("get_news", "{}")), "server"),
        (FixedRouter("server"), called(("get_weather", "{")), "server"),
        (FixedRouter("server"), called(("get_weather", "{}"), text="Well."), "server"),
    ],
    ids=["policy", "edge fails", "edge rejects", "edge invents", "edge's arguments", "edge's text"],
)
def test_invalid_call_is_text_where_no_valid_one_is(router, server, place, stream):
    application, _ = gateway(completion(BAD), server, router)
    [response] = ask(application, TOOLS | {"stream": stream})
    text, calls, reason = answer(response)
    assert (calls, reason) == ([], "stop")
    assert response.headers["x-lilliput-place"] == place
    assert "get_" in text
    shown = generate_latest(application.gateway.registry).decode()
    assert f'lilliput_invalid_tool_calls_total{{place="{place}"}} 1.0' in shown
    [required] = ask(application, TOOLS | {"stream": stream, "tool_choice": "required"})
    assert required.status_code == 502
    assert "`tool_choice` requires one" in required.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_invalid_call_behind_sent_text_stays_text(stream):
    application, fake = gateway(completion(f"Look: <tool_call>{BAD}</tool_call>"), router=FixedRouter("device"))
    [response] = ask(application, TOOLS | {"stream": stream})
    assert answer(response) == (f"Look: <tool_call>{BAD}</tool_call>", [], "stop")
    assert fake.requests["server"] == []
    assert (
        'lilliput_invalid_tool_calls_total{place="device"} 1.0'
        in generate_latest(application.gateway.registry).decode()
    )


@pytest.mark.parametrize("stream", [False, True])
def test_device_answers_when_the_edge_server_fails_and_is_not_asked_twice(stream):
    application, fake = gateway(completion(BAD), httpx.Response(500), FixedRouter("server"))
    [response] = ask(application, TOOLS | {"stream": stream})
    assert answer(response) == (BAD, [], "stop")
    assert len(fake.requests["server"]) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_edge_server_s_invalid_call_in_place_of_a_failed_device_is_text(stream):
    application, _ = gateway(httpx.Response(500), called(("get_news", "{}")))
    [response] = ask(application, TOOLS | {"stream": stream})
    text, calls, _ = answer(response)
    assert (calls, response.headers["x-lilliput-place"]) == ([], "server")
    assert "get_news" in text


def test_unsure_call_is_offloaded_by_the_cascade():
    application, _ = gateway(completion(GOOD, -3.0), completion("It is Lima."))
    [response] = ask(application, TOOLS)
    assert answer(response) == ("It is Lima.", [], "stop")
    assert "confidence" in response.headers["x-lilliput-reason"]


def test_router_sees_all_turns():
    seen = []

    class Recording(FixedRouter):
        def route_question(self, question, conditions, others=()):
            seen.append((question, others))
            return RoutingDecision("device", None, "x")

    application, _ = gateway(completion(TEXT), router=Recording("device"))
    ask(application, {"messages": LOOP}, ASK)
    question = ASK["messages"][0]["content"]
    assert seen == [(question, ('get_weather {"city": "Lima"}', "18 degrees")), (question, ())]


@pytest.mark.parametrize("body", [TOOLS, {"messages": LOOP}], ids=["tools", "results"])
@pytest.mark.parametrize("stream", [False, True])
def test_template_without_functions_gives_one_clear_error(body, stream):
    application, fake = gateway(completion(GOOD), router=FixedRouter("device"))
    fake.template = "<|im_start|>user\nlilliput-question<|im_end|>\nlilliput-result"
    [response] = ask(application, body | {"stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == ("tools" if "tools" in body else "messages")
    assert error["message"].startswith("tools: the chat template of 'pocket' knows no functions")
    assert ask(application, ASK, TOOLS | {"tool_choice": "none"})[1].status_code == 200
    assert fake.requests["server"] == []


def test_edge_server_without_functions_is_not_asked():
    application, fake = gateway(completion(GOOD), completion("It is Lima."), FixedRouter("server"))
    application.gateway.service.edge.llama_cpp = True
    prompts = iter(["{}", "none"])
    original = fake.handle_async_request

    async def handle(request):
        if request.url.path == "/apply-template":
            return httpx.Response(200, json={"prompt": next(prompts).format(request.content.decode())})
        return await original(request)

    fake.handle_async_request = handle
    [response] = ask(application, TOOLS)
    assert answer(response)[1] == [("get_weather", {"city": "Lima"})]
    assert response.headers["x-lilliput-reason"].endswith("but the edge server knows no functions")
    assert fake.requests["server"] == []


def test_calls_without_tools_are_a_failure_of_the_edge_server():
    for stream in (False, True):
        application, _ = gateway(completion("Lima"), called(("get_weather", "{}")), FixedRouter("server"))
        [response] = ask(application, ASK | {"stream": stream})
        assert answer(response) == ("Lima", [], "stop")
        assert response.headers["x-lilliput-place"] == "device"


def test_requests_with_tools_are_neither_cached_nor_shared(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    application, fake = gateway(lambda request: completion(GOOD if "tools" in request else "Lima"), cache=cache)
    application.gateway.service.router = FixedRouter("device")
    fake.delay_s["device"] = 0.05
    other = TOOLS | {"tools": [TIME]}
    bodies = [TOOLS, TOOLS, other, ASK, ASK, {"messages": LOOP}]
    answers = [answer(response) for response in ask(application, *bodies, at_once=True)]
    call = (None, [("get_weather", {"city": "Lima"})], "tool_calls")
    assert answers == [call, call, (GOOD, [], "stop"), *[("Lima", [], "stop")] * 3]
    assert len(fake.requests["device"]) == 5  # the two plain questions share one
    places = [response.headers["x-lilliput-place"] for response in ask(application, *bodies)]
    assert places == ["device", "device", "device", "cache", "cache", "device"]


@pytest.mark.parametrize("stream", [False, True])
def test_usage_log_probabilities_and_cost_of_a_call(stream):
    application, _ = gateway(completion(GOOD), router=Cascade(0.5))
    body = (
        TOOLS | {"stream": stream, "logprobs": True} | ({"stream_options": {"include_usage": True}} if stream else {})
    )
    [response] = ask(application, body)
    parts = stream_events(response)[:-1] if stream else [response.json()]
    tokens = [choice["logprobs"]["content"] for part in parts for choice in part["choices"] if choice["logprobs"]]
    assert [token["token"] for of_part in tokens for token in of_part] == [GOOD]
    [usage] = [part["usage"] for part in parts if part.get("usage")]
    assert usage["completion_tokens"] == len(GOOD.split()) + 1
    [metadata] = [part["lilliput"] for part in parts if "lilliput" in part]
    assert (metadata["place"], metadata["score"]) == ("device", pytest.approx(0.9048, abs=1e-3))
    assert 'lilliput_tool_calls_total{place="device"} 1.0' in generate_latest(application.gateway.registry).decode()
