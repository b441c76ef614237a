"""The device's process killed at once: clients get an answer or an error of the API, at once, and never a traceback."""

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
from lilliput.llama_server.process import LlamaServer, Serving
from lilliput.offload.policy import Always, Decision, Threshold
from lilliput.serve.api import App
from lilliput.serve.backends import End
from lilliput.serve.costs import Spent
from lilliput.serve.gateway import Gateway, Limits
from tests.serve.paper import ASK, DEVICE, MODEL, ByLength, Paper, ask, client, completion, service

STREAM = ASK | {"stream": True}


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mortal")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    return str(folder / "model.gguf")


@pytest.fixture
def server(model):
    with LlamaServer(Serving(model, 1, 512)) as running:
        yield running


def end_of(server):
    return End(server.url, 30.0, key=server.key, clock=server.cpu_seconds, running=lambda: server.running)


def talk(application, *steps):
    """Posts bodies and calls functions in turn, in one loop, and closes the gateway; the responses."""

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


def behind(server, router, edge=None, **more):
    """A gateway before a real llama.cpp, with an edge server of paper."""
    made = service(edge or Paper(), router, **more)
    made.device = end_of(server)
    return App(Gateway(made, Limits(max_tokens=200)))


class Unsure(Threshold):
    """Leaves everything to the device, though it might ask the server."""

    def before(self, question, conditions):
        return Decision("device", None, "unsure")


def test_a_killed_device_is_told_at_once_in_the_api_s_format(server):
    application, killed = behind(server, Always("device")), []

    def kill_it():
        kill(server)
        killed.append(time.monotonic())

    before, *after, health = talk(application, ASK | {"max_tokens": 3}, kill_it, *[ASK, STREAM] * 3, "/health")
    assert time.monotonic() - killed[0] < 3
    assert (before.status_code, health.status_code) == (200, 503)
    for response in after:
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        error = ErrorObject.model_validate(response.json()["error"], strict=True)
        assert (error.type, error.message) == ("unavailable", "the device is not running; it is being started again")


@pytest.mark.parametrize("router", [Unsure(0.5), Threshold(0.5)], ids=["before", "after a look"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_edge_server_answers_for_a_killed_device_where_the_policy_sends_it_anything(
    server, router, stream, tmp_path
):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    kill(server)
    application = behind(server, router, cache=cache)
    for response in talk(application, *[ASK | {"stream": stream}] * 2):
        assert (response.status_code, response.headers["x-lilliput-place"]) == (200, "server")
        assert "the device is not running" in response.headers["x-lilliput-reason"].replace("%20", " ")
    assert cache.count() == 0


def test_where_neither_is_there_the_device_s_error_is_told(server):
    kill(server)
    edge = Paper(server=httpx.ConnectError("down"))
    [response] = talk(behind(server, Threshold(0.5), edge), ASK)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "unavailable")
    [response] = talk(behind(server, Always("server"), edge), ASK)
    assert response.status_code == 503
    assert len(edge.asked["server"]) == 2  # once for each


@pytest.mark.parametrize("stream", [False, True])
def test_a_device_killed_in_the_midst_of_an_answer_breaks_it_off_without_a_traceback(server, stream, caplog):
    application = behind(server, Always("device"))
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
    if response.status_code == 200:  # a stream that had begun
        error = json.loads(response.text.splitlines()[-2].removeprefix("data: "))["error"]
        assert stream
    else:
        assert (response.status_code, response.headers["retry-after"]) == (502, "1")
        error = response.json()["error"]
    assert ErrorObject.model_validate(error, strict=True).type == "unanswered"


def test_an_answer_whose_process_died_costs_an_unknown_energy(server):
    spent = Spent()
    with spent.on_device(server.cpu_seconds):
        assert spent.cpu_seconds() is not None
        kill(server)
        assert spent.cpu_seconds() is None
    assert DEVICE.cost(spent, "wifi").energy_source == "unavailable"
    with spent.on_device(server.cpu_seconds):
        pass
    assert spent.cpu_seconds() is None


LIES = {
    "counts that are no numbers": {"usage": {"prompt_tokens": "many", "completion_tokens": {}}},
    "an endless count": b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"usage":'
    b'{"prompt_tokens":1e999,"completion_tokens":1}}',
    "a deep nest": b"[" * 100_000,
    "no finish reason": {"choices": [{"message": {"content": "x"}}]},
    "a finish reason of its own": {"choices": [{"message": {"content": "x"}, "finish_reason": "eos"}]},
    "a list of choices that is none": {"choices": {"0": {}}},
    "log-probabilities that are none": {
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop", "logprobs": {"content": [{"token": 1}]}}]
    },
    "bytes that are no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("lie", LIES, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_whatever_a_backend_says_the_client_gets_an_error_of_the_api(lie, stream):
    said = LIES[lie]
    content = said if isinstance(said, bytes) else json.dumps({**completion("x"), **said}).encode()
    sent = b"data: " + content + b"\n\ndata: [DONE]\n\n" if stream else content
    application = App(Gateway(service(Paper(device=httpx.Response(200, content=sent)))))
    [response] = ask(application, ASK | {"stream": stream})
    if response.status_code == 200:  # a stream of which a piece was usable
        assert stream and json.loads(response.text.splitlines()[-2].removeprefix("data: "))["error"]
    else:
        assert response.status_code == 502
        ErrorObject.model_validate(response.json()["error"], strict=True)


def test_an_error_of_the_gateway_itself_is_told_in_the_api_s_format_without_its_traceback():
    class Broken(Always):
        def before(self, question, conditions):
            raise ZeroDivisionError("secret words")

    [response] = ask(App(Gateway(service(Paper(), Broken("device")))), ASK)
    assert response.status_code == 500
    error = ErrorObject.model_validate(response.json()["error"], strict=True)
    assert (error.type, "secret words" in error.message) == ("internal_error", False)


def test_the_device_answers_again_once_it_was_started_again(server, model):
    application = behind(server, Always("device"))

    async def run():
        async with client(application) as http:
            kill(server)
            responses = [await http.post("/v1/chat/completions", json=ASK)]
            with LlamaServer(Serving(model, 1, 512)) as fresh:
                made = service(Paper())
                made.device = end_of(fresh)
                await application.gateway.replace(made)
                responses.append(await http.post("/v1/chat/completions", json=ASK | {"max_tokens": 3}))
                await application.gateway.close()
        return responses

    assert [response.status_code for response in asyncio.run(run())] == [503, 200]
