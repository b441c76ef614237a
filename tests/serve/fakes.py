"""A gateway with a fake device and a fake edge server."""

import asyncio
import json
import re
import threading
import time
from contextlib import asynccontextmanager, contextmanager

import httpx
import numpy as np
import uvicorn

from lilliput.offload.policy import FixedRouter
from lilliput.serve.__main__ import server_config
from lilliput.serve.api import App
from lilliput.serve.backends import Backend
from lilliput.serve.circuit_breaker import Breaker
from lilliput.serve.costs import DeviceCosts
from lilliput.serve.gateway import Gateway
from lilliput.serve.service import DeploymentInfo, ServedModel, Service
from lilliput.serve.transport import NetworkError
from tests.offload.links import link

MODEL = ServedModel("pocket", "sha", "Answer briefly.")
PROMPT_TOKENS = 20
ASK = {"messages": [{"role": "user", "content": "What is the capital of Peru?"}]}
WIFI = link()
DEVICE = DeviceCosts(watts_per_core=2.0, battery_wh=10.0, links={"wifi": WIFI, "poor": WIFI})


def completion(text, logprob=-0.1, finish="stop"):
    """A completion in the form of llama.cpp's server. Each word of the answer is a token, and so is the end of text."""
    message = {"role": "assistant", "content": text}
    logprobs = {"content": [{"token": text, "logprob": logprob, "bytes": None, "top_logprobs": []}]}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}],
        "usage": usage(text, finish),
    }


def called(*functions, text=None, finish="tool_calls"):
    """A completion with native calls, each a name and its arguments as a text."""
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(functions)
    ]
    body = completion(text or "", finish=finish)
    body["choices"][0]["message"] = {"role": "assistant", "content": text, "tool_calls": calls}
    return body


def usage(text, finish="stop"):
    tokens = len(text.split()) + (finish == "stop")
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}


def events(*texts, calls=(), ending="data: [DONE]\n\n", finish="stop", usage=None):
    """A stream of server-sent events. Each call comes in pieces, as from OpenAI."""
    deltas = [{"content": text} for text in texts]
    for number, call in enumerate(calls):
        function, head = call["function"], {"index": number, "id": call["id"], "type": "function"}
        deltas.append({"tool_calls": [head | {"function": {"name": function["name"], "arguments": ""}}]})
        pieces = re.findall(r".{1,7}", function["arguments"], re.DOTALL)
        deltas += [{"tool_calls": [{"index": number, "function": {"arguments": piece}}]} for piece in pieces]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage:
        chunks.append({"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ending


def _words(text):
    return re.findall(r"\s*\S+", text)


class FakeResponse:
    """Implements `lilliput.serve.transport.Response`."""

    def __init__(self, response):
        self.status, self.body = response.status_code, response.aiter_bytes


class FakeBackends:
    """Transport to both backends: sends the scripted answers and records the requests.

    `answers` holds a completion, an `httpx.Response`, an exception, or a function of the request, for each backend.
    """

    def __init__(self, device=None, server=None):
        self.answers = {"device": device or completion("Lima"), "server": server or completion("Lima, of course")}
        self.requests, self.count_requests = {"device": [], "server": []}, {"device": [], "server": []}
        self.delay_s = {"device": 0.0, "server": 0.0}
        self.template = "{}"  # the prompt that llama.cpp renders, with the request in it
        self.cancelled = 0

    @asynccontextmanager
    async def send(self, method, url, headers, content, timeout_s):
        """Implements `lilliput.serve.transport.Transport`."""
        try:
            response = await self.handle_async_request(
                httpx.Request(method, str(url), headers=headers, content=content)
            )
        except httpx.HTTPError as error:
            raise NetworkError(str(error)) from error
        try:
            yield FakeResponse(response)
        finally:
            await response.aclose()

    async def close(self):
        pass

    async def handle_async_request(self, request):
        backend = request.url.host
        if request.url.path == "/health":
            return httpx.Response(200)
        body = json.loads(request.content)
        if request.url.path == "/apply-template":
            return httpx.Response(200, json={"prompt": self.template.format(json.dumps(body))})
        if request.url.path.endswith("/input_tokens"):
            self.count_requests[backend].append(body)
            return httpx.Response(200, json={"input_tokens": len(body["messages"][-1]["content"].split())})
        self.requests[backend].append(body)
        try:
            await asyncio.sleep(self.delay_s[backend])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        answer = self.answers[backend]
        if callable(answer):
            answer = answer(body)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        if body["stream"]:
            [choice] = answer["choices"]
            counts = body.get("stream_options", {}).get("include_usage") and answer["usage"]
            words, finish = _words(choice["message"]["content"] or ""), choice["finish_reason"]
            calls = choice["message"].get("tool_calls") or ()
            return httpx.Response(200, text=events(*words, calls=calls, finish=finish, usage=counts))
        return httpx.Response(200, json=answer)


class FakeEmbedder:
    """An embedder that gives every text the same vector."""

    sha256 = "fake"

    def fits(self, text):
        return True

    def embed(self, texts):
        return np.array([[1.0, 0.0] for _ in texts], dtype=np.float32)


def service(fake, router=None, *, server=True, timeout_s=5.0, model=MODEL, clock=None, **more):
    return Service(
        DeploymentInfo("phone", "policy", "lora", "wifi"),
        DEVICE,
        model,
        Backend("http://device", 5.0, transport=fake, clock=clock),
        Backend("http://server", timeout_s, transport=fake, breaker=Breaker()) if server else None,
        router or FixedRouter("device"),
        **more,
    )


def app(fake, router=None, *, limits=None, token=None, admin=None, **more):
    return App(Gateway(service(fake, router, **more), limits), token, admin)


def client(application, **more):
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **more)


def ask(application, *bodies, at_once=False, headers=None, path="/v1/chat/completions"):
    """Sends requests to a gateway, one after another or all at once, and returns the responses."""

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


def stream_events(response):
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


def stream_text(chunks):
    return "".join(
        chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk != "[DONE]" and chunk["choices"]
    )


@contextmanager
def served(application, proxies=()):
    """Serves the application on a loopback socket and yields its address."""
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
