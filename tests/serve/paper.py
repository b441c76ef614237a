"""A device and an edge server of paper, and a gateway before them."""

import asyncio
import json
import re
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import uvicorn

from lilliput.config import LinkConfig
from lilliput.offload.policy import Always
from lilliput.serve.__main__ import server_config
from lilliput.serve.api import App
from lilliput.serve.backends import End
from lilliput.serve.circuit_breaker import Breaker
from lilliput.serve.costs import Device
from lilliput.serve.gateway import Gateway
from lilliput.serve.service import Model, Service, Setting

MODEL = Model("pocket", "sha", "Answer briefly.")
PROMPT_TOKENS = 20
ASK = {"messages": [{"role": "user", "content": "What is the capital of Peru?"}]}
WIFI = LinkConfig(
    up_mbit_per_s=8.0,
    down_mbit_per_s=8.0,
    round_trip_ms=10.0,
    loss=0.0,
    up_j_per_byte=1e-6,
    down_j_per_byte=1e-6,
    active_watts=0.5,
    tail_s=0.2,
    tail_watts=0.1,
)
DEVICE = Device(watts_per_core=2.0, battery_wh=10.0, links={"wifi": WIFI, "poor": WIFI})


def completion(text, logprob=-0.1, finish="stop"):
    """A completion as llama.cpp's server gives it; each word of the answer is a token, and so is its end."""
    message = {"role": "assistant", "content": text}
    told = {"content": [{"token": text, "logprob": logprob, "bytes": None, "top_logprobs": []}]}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": told, "finish_reason": finish}],
        "usage": usage(text, finish),
    }


def usage(text, finish="stop"):
    tokens = len(text.split()) + (finish == "stop")
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}


def events(*texts, ending="data: [DONE]\n\n", finish="stop", usage=None):
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage:
        chunks.append({"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ending


def _words(text):
    return re.findall(r"\s*\S+", text)


class Paper(httpx.AsyncBaseTransport):
    """Both ends: what each says, and what it was asked."""

    def __init__(self, device=None, server=None):
        self.says = {"device": device or completion("Lima"), "server": server or completion("Lima, of course")}
        self.asked, self.counted = {"device": [], "server": []}, {"device": [], "server": []}
        self.delay_s = {"device": 0.0, "server": 0.0}
        self.given_up = 0

    async def handle_async_request(self, request):
        end = request.url.host
        if request.url.path == "/health":
            return httpx.Response(200)
        asked = json.loads(request.content)
        if request.url.path.endswith("/input_tokens"):
            self.counted[end].append(asked)
            return httpx.Response(200, json={"input_tokens": len(asked["messages"][-1]["content"].split())})
        self.asked[end].append(asked)
        try:
            await asyncio.sleep(self.delay_s[end])
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        said = self.says[end]
        if callable(said):
            said = said(asked)
        if isinstance(said, Exception):
            raise said
        if isinstance(said, httpx.Response):
            return said
        if asked["stream"]:
            [choice], counts = said["choices"], asked.get("stream_options", {}).get("include_usage") and said["usage"]
            words, finish = _words(choice["message"]["content"]), choice["finish_reason"]
            return httpx.Response(200, text=events(*words, finish=finish, usage=counts))
        return httpx.Response(200, json=said)


class ByLength:
    """An embedder of paper."""

    sha256 = "paper"

    def fits(self, text):
        return True

    def embed(self, texts):
        return np.array([[1.0, 0.0] for _ in texts], dtype=np.float32)


def service(paper, router=None, *, server=True, timeout_s=5.0, model=MODEL, clock=None, **more):
    return Service(
        Setting("phone", "policy", "lora", "wifi"),
        DEVICE,
        model,
        End("http://device", 5.0, transport=paper, clock=clock),
        End("http://server", timeout_s, transport=paper, breaker=Breaker()) if server else None,
        router or Always("device"),
        **more,
    )


def app(paper, router=None, *, limits=None, token=None, admin=None, **more):
    return App(Gateway(service(paper, router, **more), limits), token, admin)


def client(application, **more):
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **more)


def ask(application, *bodies, at_once=False, headers=None, path="/v1/chat/completions"):
    """Sends requests to a gateway, one after another or all at once; the responses."""

    async def run():
        async with client(application, headers=headers) as http:
            if not bodies:
                return [await http.get(path)]
            if at_once:
                return await asyncio.gather(*(http.post(path, json=body) for body in bodies))
            return [await http.post(path, json=body) for body in bodies]

    return asyncio.run(run())


def text(response):
    return response.json()["choices"][0]["message"]["content"]


def pieces(response):
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


def said(chunks):
    return "".join(
        chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk != "[DONE]" and chunk["choices"]
    )


@contextmanager
def served(application, proxies=()):
    """The application on a real socket of loopback; its address."""
    server = uvicorn.Server(server_config(application, "127.0.0.1", 0, proxies))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
