"""The gateway and llama.cpp's own server."""

import asyncio

import httpx
import psutil
import pytest

from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.errors import ArtifactError
from lilliput.llama_server.process import LlamaServer, ServerSettings
from lilliput.offload.policy import ThresholdRouter
from lilliput.serve.backends import Backend
from lilliput.serve.gateway import Limits
from tests.serve.fakes import (
    ASK,
    FakeBackends,
    app,
    ask,
    stream_events,
)


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    with LlamaServer(ServerSettings(str(folder / "model.gguf"), 1, 512)) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_gateway_with_llama_cpp_server(served, stream):
    application = app(FakeBackends(), None if stream else ThresholdRouter(0.0), limits=Limits(max_tokens=6))
    application.gateway.service.device = Backend(served.url, 30.0, key=served.key, clock=served.cpu_seconds)
    [response] = ask(application, ASK | {"stream": stream, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    if stream:
        *chunks, done = stream_events(response)
        assert done == "[DONE]"
        metadata = next(chunk["lilliput"] for chunk in chunks if "lilliput" in chunk)
        assert any(chunk.get("usage", None) for chunk in chunks)
    else:
        metadata = response.json()["lilliput"]
        assert 0.0 < metadata["score"] <= 1.0
        assert response.json()["usage"]["completion_tokens"] <= 6
    assert metadata["energy_j"] > 0


def test_llama_cpp_server_requires_its_key_and_allows_no_web_page(served):
    body = {"messages": ASK["messages"], "content": "x", "prompt": "x", "max_tokens": 1, "n_predict": 1}
    posts = ["/v1/chat/completions", "/completion", "/tokenize", "/apply-template", "/props", "/v1/embeddings"]
    gets = ["/v1/models", "/models", "/props", "/slots", "/metrics", "/lora-adapters", "/api/tags"]
    endpoints = [("POST", path) for path in posts] + [("GET", path) for path in gets]
    cross_origin = {"Origin": "http://evil.example", "Host": "evil.example"}
    with httpx.Client(base_url=served.url, limits=httpx.Limits(max_keepalive_connections=0)) as client:

        def send(method, path, headers):
            return client.request(method, path, headers=cross_origin | headers, json=body if method == "POST" else None)

        for headers in ({}, {"Authorization": "Bearer guess"}, {"x-api-key": "guess"}):
            assert {path: send(method, path, headers).status_code for method, path in endpoints} == dict.fromkeys(
                (path for _, path in endpoints), 401
            )
        authorized = {"Authorization": f"Bearer {served.key}"}
        for path in ("/slots", "/metrics"):
            assert send("GET", path, authorized).status_code == 501
        assert send("POST", "/props", authorized).status_code == 501
        assert send("GET", "/", {}).status_code == 404  # llama.cpp's own page
        for method, path in [*endpoints, ("OPTIONS", "/v1/chat/completions"), ("GET", "/health")]:
            allowed = send(method, path, authorized).headers
            assert allowed.get("access-control-allow-origin") in (None, "http://nobody.invalid")
            assert allowed.get("access-control-allow-credentials", "false") == "false"
    asyncio.run(_answers(Backend(served.url, 30.0, key=served.key)))


async def _answers(backend):
    request = {"messages": ASK["messages"], "max_tokens": 3}
    assert (await backend.ask(request))["usage"]["completion_tokens"] <= 3
    assert await backend.count_prompt(request) == (await backend.ask(request))["usage"]["prompt_tokens"] > 5
    assert await backend.healthy()
    await backend.close()


def test_key_is_in_neither_command_line_nor_environment(served):
    assert served.running
    process = psutil.Process(served._process.pid)
    assert len(served.key) > 30
    assert served.key not in " ".join([*process.cmdline(), *process.environ().values()])


def test_a_file_that_is_not_a_model_is_rejected(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ArtifactError, match="did not start"):
        LlamaServer(ServerSettings(str(tmp_path / "model.gguf"), 1, 64), deadline_s=30)
