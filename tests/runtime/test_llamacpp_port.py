"""llama.cpp opens a loopback port even when used in-process; other programs get no answer there."""

import httpx
import pytest

from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.runtime.llamacpp import LlamaCppRuntime


@pytest.fixture(scope="module")
def runtime(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="a", target="gguf", floats="f32", embeddings="f32"))
    return LlamaCppRuntime(folder / "model.gguf", threads=1, context_tokens=128)


@pytest.mark.parametrize("path", ["/completion", "/tokenize", "/apply-template", "/v1/chat/completions", "/props"])
def test_requests_without_the_key_are_rejected(runtime, path):
    messages = [{"role": "user", "content": "x"}]
    body = {"prompt": "x", "content": "x", "messages": messages, "n_predict": 1, "max_tokens": 1}
    page = {"Origin": "http://evil.example"}
    answer = httpx.post(f"{runtime._server.listening_address}{path}", json=body, headers=page, trust_env=False)
    assert answer.status_code == 401
    assert answer.headers.get("access-control-allow-origin") in (None, "http://nobody.invalid")


def test_the_runtime_itself_gets_answers(runtime):
    assert list(runtime.predictions([1, 2, 3, 4], 2))
    assert len(list(runtime.stream([1, 2, 3], 3))) > 0
    assert runtime.chat_ids([{"role": "user", "content": "Why?"}])
