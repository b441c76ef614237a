"""Sudden death of the device's process: clients get an answer or an API error at once, and never a traceback."""

import asyncio
import json
import os
import signal
import time

import httpx
import pytest
from openai.types.shared.error_object import ErrorObject

from lilliput.cache.answers import AnswerCache
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.llama_server.process import LlamaServer, ServerSettings
from lilliput.offload.policy import FixedRouter, RoutingDecision, ThresholdRouter
from lilliput.serve.api import App
from lilliput.serve.backends import Backend
from lilliput.serve.costs import ResourceUsage
from lilliput.serve.gateway import Gateway, Limits
from tests.serve.fakes import ASK, DEVICE, MODEL, FakeBackends, FakeEmbedder, ask, client, completion, service

STREAM = ASK | {"stream": True}


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mortal")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    return str(folder / "model.gguf")


@pytest.fixture
def server(model):
    with LlamaServer(ServerSettings(model, 1, 512)) as running:
        yield running


def backend_of(server):
    return Backend(server.url, 30.0, key=server.key, clock=server.cpu_seconds, running=lambda: server.running)


def run_steps(application, *steps):
    """Posts bodies and calls functions in turn, closes the gateway, and returns the responses."""

    async def run():
        responses = []
        async with client(application) as http:
            for step in steps:
                if callable(step):
                    step()
                elif isinstance(step, str):
                    responses.append(await http.get(step))
                else:
                    responses.append(await http.post("/v1/chat/completions", json=step))
        await application.gateway.close()
        return responses

    return asyncio.run(run())


def kill(server):
    os.kill(server._process.pid, signal.SIGKILL)
    server._process.wait()


def gateway_for(server, router, edge=None, **more):
    """A gateway with a real llama.cpp server and a fake edge server."""
    made = service(edge or FakeBackends(), router, **more)
    made.device = backend_of(server)
    return App(Gateway(made, Limits(max_tokens=200)))


class PreferDevice(ThresholdRouter):
    """Always selects the device, with a rule that allows the server."""

    def route_question(self, question, conditions, others=()):
        return RoutingDecision("device", None, "unsure")


def test_killed_device_gives_an_immediate_api_error(server):
    application, killed = gateway_for(server, FixedRouter("device")), []

    def kill_it():
        kill(server)
        killed.append(time.monotonic())

    before, *after, health = run_steps(application, ASK | {"max_tokens": 3}, kill_it, *[ASK, STREAM] * 3, "/health")
    assert time.monotonic() - killed[0] < 3
    assert (before.status_code, health.status_code) == (200, 503)
    for response in after:
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        error = ErrorObject.model_validate(response.json()["error"], strict=True)
        assert (error.type, error.message) == ("unavailable", "the device is not running; it is being started again")


@pytest.mark.parametrize("router", [PreferDevice(0.5), ThresholdRouter(0.5)], ids=["before", "cascade"])
@pytest.mark.parametrize("stream", [False, True])
def test_edge_server_replaces_a_killed_device_if_the_policy_allows_it(server, router, stream, tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    kill(server)
    application = gateway_for(server, router, cache=cache)
    for response in run_steps(application, *[ASK | {"stream": stream}] * 2):
        assert (response.status_code, response.headers["x-lilliput-place"]) == (200, "server")
        assert "the device is not running" in response.headers["x-lilliput-reason"].replace("%20", " ")
    assert cache.count() == 0


def test_device_error_is_reported_when_both_backends_fail(server):
    kill(server)
    edge = FakeBackends(server=httpx.ConnectError("down"))
    [response] = run_steps(gateway_for(server, ThresholdRouter(0.5), edge), ASK)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "unavailable")
    [response] = run_steps(gateway_for(server, FixedRouter("server"), edge), ASK)
    assert response.status_code == 503
    assert len(edge.requests["server"]) == 2  # once for each


@pytest.mark.parametrize("stream", [False, True])
def test_device_killed_during_an_answer_gives_an_error_without_traceback(server, stream, caplog):
    application = gateway_for(server, FixedRouter("device"))
    prompt = {"messages": [{"role": "user", "content": "word " * 400}], "max_tokens": 100, "stream": stream}

    async def run():
        async with client(application) as http:
            request = asyncio.create_task(http.post("/v1/chat/completions", json=prompt, timeout=30))
            before = server.cpu_seconds()
            while server.cpu_seconds() < before + 0.02 and not request.done():
                await asyncio.sleep(0.005)
            kill(server)
            response = await request
        await application.gateway.close()
        return response

    response = asyncio.run(run())
    assert "Traceback" not in response.text + caplog.text
    if response.status_code == 200:  # the stream had begun
        error = json.loads(response.text.splitlines()[-2].removeprefix("data: "))["error"]
        assert stream
    else:
        assert (response.status_code, response.headers["retry-after"]) == (502, "1")
        error = response.json()["error"]
    assert ErrorObject.model_validate(error, strict=True).type == "unanswered"


def test_energy_is_unknown_after_the_process_died(server):
    spent = ResourceUsage()
    with spent.measure_device(server.cpu_seconds):
        assert spent.cpu_seconds() is not None
        kill(server)
        assert spent.cpu_seconds() is None
    assert DEVICE.cost(spent, "wifi").energy_source == "unavailable"
    with spent.measure_device(server.cpu_seconds):
        pass
    assert spent.cpu_seconds() is None


MALFORMED = {
    "counts are not numbers": {"usage": {"prompt_tokens": "many", "completion_tokens": {}}},
    "infinite count": b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"usage":'
    b'{"prompt_tokens":1e999,"completion_tokens":1}}',
    "deep nesting": b"[" * 100_000,
    "no finish reason": {"choices": [{"message": {"content": "x"}}]},
    "unknown finish reason": {"choices": [{"message": {"content": "x"}, "finish_reason": "eos"}]},
    "choices are not a list": {"choices": {"0": {}}},
    "invalid log-probabilities": {
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop", "logprobs": {"content": [{"token": 1}]}}]
    },
    "invalid UTF-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("case", MALFORMED, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_malformed_backend_answers_become_api_errors(case, stream):
    answer = MALFORMED[case]
    content = answer if isinstance(answer, bytes) else json.dumps({**completion("x"), **answer}).encode()
    sent = b"data: " + content + b"\n\ndata: [DONE]\n\n" if stream else content
    application = App(Gateway(service(FakeBackends(device=httpx.Response(200, content=sent)))))
    [response] = ask(application, ASK | {"stream": stream})
    if response.status_code == 200:  # the stream had a valid chunk
        assert stream and json.loads(response.text.splitlines()[-2].removeprefix("data: "))["error"]
    else:
        assert response.status_code == 502
        ErrorObject.model_validate(response.json()["error"], strict=True)


def test_internal_error_is_an_api_error_without_traceback():
    class Broken(FixedRouter):
        def route_question(self, question, conditions, others=()):
            raise ZeroDivisionError("secret words")

    [response] = ask(App(Gateway(service(FakeBackends(), Broken("device")))), ASK)
    assert response.status_code == 500
    error = ErrorObject.model_validate(response.json()["error"], strict=True)
    assert (error.type, "secret words" in error.message) == ("internal_error", False)


def test_device_answers_after_a_restart(server, model):
    application = gateway_for(server, FixedRouter("device"))

    async def run():
        async with client(application) as http:
            kill(server)
            responses = [await http.post("/v1/chat/completions", json=ASK)]
            with LlamaServer(ServerSettings(model, 1, 512)) as fresh:
                made = service(FakeBackends())
                made.device = backend_of(fresh)
                await application.gateway.replace(made)
                responses.append(await http.post("/v1/chat/completions", json=ASK | {"max_tokens": 3}))
                await application.gateway.close()
        return responses

    assert [response.status_code for response in asyncio.run(run())] == [503, 200]
