"""The gateway against a device and an edge server of paper, and once against llama.cpp's own server."""

import asyncio
import json

import httpx
import pytest

from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.errors import ArtifactError
from lilliput.serve.cache import AnswerCache
from lilliput.serve.gateway import Gateway, Limits, Model, create_app
from lilliput.serve.router import Always, Threshold
from lilliput.serve.server import LlamaServer, Serving

MODEL = Model("pocket", "sha", "Answer briefly.")
ASK = {"messages": [{"role": "user", "content": "What is the capital of Peru?"}]}


def completion(text, logprob=-0.1):
    message = {"role": "assistant", "content": text}
    told = {"content": [{"token": text, "logprob": logprob}]}
    return {
        "id": "1",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": told, "finish_reason": "stop"}],
    }


class Paper(httpx.AsyncBaseTransport):
    """Both ends: what each says, and what it was asked."""

    def __init__(self, device=None, server=None):
        self.says = {"device": device or completion("Lima"), "server": server or completion("Lima, of course")}
        self.asked = {"device": [], "server": []}
        self.delay_s = 0.0

    async def handle_async_request(self, request):
        end = request.url.host
        if request.url.path == "/health":
            return httpx.Response(200)
        self.asked[end].append(json.loads(request.content))
        await asyncio.sleep(self.delay_s)
        said = self.says[end]
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, httpx.Response) else httpx.Response(200, json=said)


class ByLength:
    """An embedder of paper."""

    sha256 = "paper"

    def embed(self, texts):
        import numpy as np

        return np.array([[1.0, 0.0] for _ in texts], dtype=np.float32)


@pytest.fixture
def ask():
    """Sends requests to a gateway, one after another or all at once; the responses."""

    def send(paper, *bodies, router=None, at_once=False, token=None, headers=None, path="/v1/chat/completions", **more):
        async def run():
            gateway = Gateway(
                "http://device",
                "http://server",
                MODEL,
                router or Always("device"),
                token=token,
                transport=paper,
                **more,
            )
            transport = httpx.ASGITransport(create_app(gateway))
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
                if not bodies:
                    return [await client.get(path)]
                if at_once:
                    return await asyncio.gather(*(client.post(path, json=body) for body in bodies))
                return [await client.post(path, json=body) for body in bodies]

        return asyncio.run(run())

    return send


def text(response):
    return response.json()["choices"][0]["message"]["content"]


def test_the_device_answers_with_its_own_system_line(ask):
    paper = Paper()
    [response] = ask(paper, ASK)
    assert text(response) == "Lima"
    assert response.headers["x-lilliput-place"] == "device"
    assert paper.asked["device"][0]["messages"][0] == {"role": "system", "content": "Answer briefly."}
    assert paper.asked["device"][0]["temperature"] == 0.0
    assert paper.asked["server"] == []


@pytest.mark.parametrize(("logprob", "place"), [(-0.1, "device"), (-3.0, "server")])
def test_after_a_first_look_the_unsure_are_offloaded(ask, logprob, place):
    paper = Paper(device=completion("Lima?", logprob))
    [response] = ask(paper, ASK, router=Threshold(0.5))
    assert response.headers["x-lilliput-place"] == place
    assert float(response.headers["x-lilliput-score"]) == pytest.approx({-0.1: 0.9048, -3.0: 0.0498}[logprob], abs=1e-4)
    assert text(response) == {"device": "Lima?", "server": "Lima, of course"}[place]


@pytest.mark.parametrize(
    "said",
    [
        httpx.ConnectError("down"),
        httpx.ReadTimeout("half-open"),
        httpx.Response(500),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"choices": []}),
        httpx.Response(200, json={"choices": [{"message": {"content": None}}]}),
        httpx.Response(200, json=["lies"]),
    ],
    ids=["down", "half-open", "error", "no JSON", "no choices", "no text", "no object"],
)
def test_a_server_that_is_down_slow_or_lying_leaves_the_device_s_answer(ask, said):
    paper = Paper(server=said)
    [response] = ask(paper, ASK, router=Always("server"))
    assert response.status_code == 200
    assert response.headers["x-lilliput-place"] == "device"
    assert "but the edge server failed" in response.headers["x-lilliput-reason"]


def test_a_slow_server_is_not_waited_for_beyond_its_deadline(ask):
    paper = Paper()
    paper.delay_s = 0.2
    [response] = ask(paper, ASK, router=Always("server"), limits=Limits(server_timeout_s=0.05))
    assert response.headers["x-lilliput-place"] == "device"
    assert "TimeoutError" in response.headers["x-lilliput-reason"]


def test_after_three_failures_the_server_is_left_alone(ask):
    paper = Paper(server=httpx.Response(500))
    responses = ask(paper, *[ASK] * 5, router=Always("server"))
    assert len(paper.asked["server"]) == 3
    assert responses[-1].headers["x-lilliput-reason"].endswith("but the edge server was down")


def test_a_device_without_an_answer_is_told(ask):
    [response] = ask(Paper(device=httpx.Response(500)), ASK)
    assert response.status_code == 502
    assert response.json()["error"]["type"] == "unanswered"


def test_more_than_may_wait_are_sent_away_and_no_answer_is_mixed_up(ask):
    paper = Paper()
    paper.delay_s = 0.05
    responses = ask(paper, *[ASK] * 6, at_once=True, limits=Limits(device_slots=1, waiting=2))
    states = [response.status_code for response in responses]
    assert states.count(200) == 3
    assert states.count(503) == 3
    assert all(r.headers["retry-after"] == "1" for r in responses if r.status_code == 503)


def test_the_cache_answers_again_and_never_what_sampling_or_talk_made(ask, tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    paper = Paper()
    talk = {"messages": [*ASK["messages"], {"role": "assistant", "content": "Lima"}, *ASK["messages"]]}
    responses = ask(paper, ASK, ASK, ASK | {"temperature": 0.7}, talk, cache=cache)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "cache", "device", "device"]
    assert text(responses[1]) == "Lima"
    assert len(paper.asked["device"]) == 3


@pytest.mark.parametrize(("server", "places"), [(None, ["server", "cache"]), (httpx.Response(500), ["device"] * 2)])
def test_the_cache_keeps_what_the_server_said_and_no_makeshift(ask, tmp_path, server, places):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    responses = ask(Paper(server=server), ASK, ASK, router=Always("server"), cache=cache)
    assert [r.headers["x-lilliput-place"] for r in responses] == places


def test_a_stream_is_the_same_answer(ask):
    [response] = ask(Paper(), ASK | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]) == "Lima"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "root", "content": "x"}]},
        ASK | {"max_tokens": 0},
        ASK | {"temperature": 9},
        [],
    ],
)
def test_what_is_no_request_gets_one_clear_error(ask, body):
    [response] = ask(Paper(), body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_too_large_a_body_is_refused_before_it_is_read(ask):
    [response] = ask(Paper(), ASK | {"user": "x" * 200}, limits=Limits(body_bytes=100))
    assert response.status_code == 413


def test_beyond_loopback_a_token_is_asked(ask):
    assert ask(Paper(), ASK, token="secret")[0].status_code == 401
    assert ask(Paper(), ASK, token="secret", headers={"Authorization": "Bearer secre"})[0].status_code == 401
    assert ask(Paper(), ASK, token="secret", headers={"Authorization": "Bearer secret"})[0].status_code == 200


def test_models_health_and_metrics(ask):
    assert ask(Paper(), path="/v1/models")[0].json()["data"][0]["id"] == "pocket"
    assert ask(Paper(), path="/health")[0].json() == {"status": "ok"}
    assert "lilliput_answers" in ask(Paper(), path="/metrics")[0].text


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    with LlamaServer(Serving(str(folder / "model.gguf"), 1, 512)) as server:
        yield server


def test_llama_cpp_s_own_server_stands_behind_it(served):
    async def run():
        gateway = Gateway(served.url, None, MODEL, Threshold(0.0), limits=Limits(max_tokens=6))
        transport = httpx.ASGITransport(create_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.get("/health"), await client.post("/v1/chat/completions", json=ASK)

    health, response = asyncio.run(run())
    assert health.status_code == 200
    assert response.status_code == 200, response.text
    assert 0.0 < float(response.headers["x-lilliput-score"]) <= 1.0
    assert response.json()["usage"]["completion_tokens"] <= 6


def test_a_server_ends_when_it_is_stopped(served):
    assert served.running


def test_a_file_that_is_no_model_is_told(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ArtifactError, match="did not start"):
        LlamaServer(Serving(str(tmp_path / "model.gguf"), 1, 64), deadline_s=30)
