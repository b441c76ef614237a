"""One door in front of a device model and an edge server, speaking OpenAI's chat API: device first."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from lilliput.serve.breaker import Breaker
from lilliput.serve.cache import AnswerCache
from lilliput.serve.router import Conditions, Decision, Router

log = logging.getLogger("lilliput.gateway")
Next = Callable[[Request], Awaitable[Response]]
# Unreachable, an error status, too slow, no JSON, or JSON that is no chat completion.
_FAILURES = (httpx.HTTPError, TimeoutError, ValueError, KeyError, IndexError, TypeError)


@dataclass(frozen=True)
class Limits:
    """What the gateway takes upon itself.

    Attributes:
        body_bytes: of a request.
        max_tokens: of an answer; asking for more is cut to it.
        device_slots: answers the device gives at once.
        waiting: requests that may wait for a slot; beyond that 503 with Retry-After.
        server_timeout_s: after which the edge server counts as down for a request, and the device answers.
        device_timeout_s: after which the device is given up: 502.
    """

    body_bytes: int = 64 * 1024
    max_tokens: int = 256
    device_slots: int = 1
    waiting: int = 64
    server_timeout_s: float = 10.0
    device_timeout_s: float = 60.0


@dataclass(frozen=True)
class Model:
    """What answers on the device.

    Attributes:
        name: as `/v1/models` tells it.
        version: its sha256; the answer cache is keyed by it.
        system_prompt: the line it was tuned with, put before questions that bring none.
    """

    name: str
    version: str
    system_prompt: str


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, Field(pattern="^(system|user|assistant)$")]
    content: Annotated[str, Field(max_length=32_768)]


class Chat(BaseModel):
    """A request to /v1/chat/completions, as far as the gateway reads it; the rest is handed on."""

    model_config = ConfigDict(extra="allow")
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    stream: bool = False
    max_tokens: Annotated[int | None, Field(gt=0)] = None
    temperature: Annotated[float | None, Field(ge=0.0, le=2.0)] = None

    @property
    def question(self) -> str:
        """The last thing the user said."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")

    @property
    def cacheable(self) -> bool:
        """Whether the answer follows from one question alone: a single turn, answered greedily, no tools or formats."""
        turns = [message.role for message in self.messages if message.role != "system"]
        return turns == ["user"] and not self.temperature and not (self.model_extra or {}).keys() - {"model", "user"}


@dataclass(frozen=True)
class Answer:
    """An OpenAI chat completion, where it came from and why."""

    body: dict[str, Any]
    place: str
    decision: Decision

    @property
    def text(self) -> str:
        """What the model said."""
        return str(self.body["choices"][0]["message"]["content"])


class Gateway:
    """Routes requests between a device, an edge server and an answer cache.

    Args:
        device_url: an OpenAI-compatible server with the compiled model, without `/v1`.
        server_url: the edge server's; None where there is none.
        model: what answers on the device.
        router: who answers.
        cache: answers given before; None for none.
        limits: what is taken on.
        token: that requests have to bear; None on loopback.
        transport: how the two are reached; HTTP if None.
    """

    def __init__(
        self,
        device_url: str,
        server_url: str | None,
        model: Model,
        router: Router,
        cache: AnswerCache | None = None,
        limits: Limits | None = None,
        token: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.model, self.router, self.cache, self.token = model, router, cache, token
        self.limits = limits or Limits()
        self._urls = {"device": device_url, "server": server_url}
        self._client = httpx.AsyncClient(limits=httpx.Limits(max_connections=256), transport=transport)
        self._slots = asyncio.Semaphore(self.limits.device_slots)
        self._waiting = 0
        self.breaker = Breaker()
        self.registry = CollectorRegistry()
        self._answers = Counter("lilliput_answers", "Answers given", ["place"], registry=self.registry)
        self._seconds = Histogram("lilliput_answer_seconds", "Seconds to answer", ["place"], registry=self.registry)

    async def close(self) -> None:
        """Lets go of its connections."""
        await self._client.aclose()

    async def healthy(self) -> bool:
        """Whether the device answers."""
        try:
            return (await self._client.get(f"{self._urls['device']}/health", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def answer(self, chat: Chat) -> Answer:
        """The answer to `chat`, from the cache, the device or the edge server.

        Raises:
            Overloaded: too many wait for the device.
            Unanswered: neither device nor server gave a usable answer.
        """
        started = time.perf_counter()
        found = await self._cached(chat) or await self._routed(chat)
        self._answers.labels(found.place).inc()
        self._seconds.labels(found.place).observe(time.perf_counter() - started)
        log.info("%s: %s", found.place, found.decision.reason)  # never what was asked
        return found

    async def _cached(self, chat: Chat) -> Answer | None:
        if self.cache is None or not chat.cacheable:
            return None
        asked = self.cache.asked(chat.question)
        hit = await asyncio.to_thread(self.cache.find, asked)
        if hit is None:
            return None
        decision = Decision("device", hit.similarity, f"{hit.kind} hit in the answer cache")
        return Answer(_completion(hit.answer, self.model.name), "cache", decision)

    async def _routed(self, chat: Chat) -> Answer:
        conditions = Conditions("wifi")
        decision, local = self.router.before(chat.question, conditions), None
        if decision is None:
            local = await self._device(chat)
            decision = self.router.after(chat.question, _logprobs(local), conditions)
        if decision.place == "server":
            remote, why_not = await self._server(chat)
            if remote is not None:
                return await self._remembered(chat, Answer(remote, "server", decision))
            decision = Decision("device", decision.score, f"{decision.reason}, but {why_not}")
            return Answer(local or await self._device(chat), "device", decision)  # a makeshift: not remembered
        return await self._remembered(chat, Answer(local or await self._device(chat), "device", decision))

    async def _remembered(self, chat: Chat, answer: Answer) -> Answer:
        if self.cache is not None and chat.cacheable:
            await asyncio.to_thread(self.cache.store, self.cache.asked(chat.question), answer.text)
        return answer

    async def _device(self, chat: Chat) -> dict[str, Any]:
        if self._slots.locked() and self._waiting >= self.limits.waiting:
            raise Overloaded
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            asked = self._request(chat) | {"logprobs": True, "stream": False}
            return await self._ask("device", asked, self.limits.device_timeout_s)
        except _FAILURES as error:
            raise Unanswered(f"the device gave no usable answer: {type(error).__name__}") from None
        finally:
            self._slots.release()

    async def _server(self, chat: Chat) -> tuple[dict[str, Any] | None, str]:
        """The edge server's answer, or None and what is the matter with it."""
        if self._urls["server"] is None:
            return None, "there is no edge server"
        if not self.breaker.closed():
            return None, "the edge server was down"
        try:
            body = await self._ask("server", self._request(chat), self.limits.server_timeout_s)
        except _FAILURES as error:
            self.breaker.failed()
            return None, f"the edge server failed ({type(error).__name__})"
        self.breaker.succeeded()
        return body, ""

    def _request(self, chat: Chat) -> dict[str, Any]:
        body = chat.model_dump(exclude_none=True)
        if chat.messages[0].role != "system":
            body["messages"] = [{"role": "system", "content": self.model.system_prompt}, *body["messages"]]
        wanted = min(chat.max_tokens or self.limits.max_tokens, self.limits.max_tokens)
        return {"temperature": 0.0, **body, "max_tokens": wanted, "stream": False}

    async def _ask(self, place: str, asked: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """What `place` answers; a body that is no chat completion raises one of _FAILURES."""
        async with asyncio.timeout(timeout_s):
            response = await self._client.post(
                f"{self._urls[place]}/v1/chat/completions", json=dict(asked), timeout=timeout_s
            )
        response.raise_for_status()
        body = response.json()
        if not isinstance(body["choices"][0]["message"]["content"], str):
            raise ValueError("no text in the answer")
        return body


class Overloaded(Exception):
    """Too many requests wait for the device."""


class Unanswered(Exception):
    """Nobody gave a usable answer."""


def create_app(gateway: Gateway) -> FastAPI:
    """The gateway as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.close()

    app = FastAPI(title="Lilliput gateway", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.middleware("http")(_guard(gateway))
    app.add_exception_handler(RequestValidationError, _refused)
    app.include_router(_looking_after(gateway))
    app.include_router(_chatting(gateway))
    return app


def _guard(gateway: Gateway) -> Callable[[Request, Next], Awaitable[Response]]:
    """Lets nobody pass without the token, where one is asked, nor with too large a body."""

    async def guard(request: Request, proceed: Next) -> Response:
        if gateway.token is not None and request.url.path != "/health":
            told = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(told.encode(), gateway.token.encode()):
                return _error(401, "a bearer token is required", "invalid_api_key")
        length = request.headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length) > gateway.limits.body_bytes):
            return _error(413, f"at most {gateway.limits.body_bytes} bytes are taken", "request_too_large")
        return await proceed(request)

    return guard


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _error(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}", "invalid_request_error")


def _looking_after(gateway: Gateway) -> APIRouter:
    """What those who run it look at."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        ok = await gateway.healthy()
        return JSONResponse({"status": "ok" if ok else "the device does not answer"}, 200 if ok else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.registry), media_type="text/plain; version=0.0.4")

    return routes


def _chatting(gateway: Gateway) -> APIRouter:
    """OpenAI's API, as far as it goes."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": gateway.model.name, "object": "model", "owned_by": "lilliput"}]}

    @routes.post("/chat/completions")
    async def chat(request: Chat) -> Response:
        try:
            answer = await gateway.answer(request)
        except Overloaded:
            return _error(503, "too many requests wait for the device", "overloaded", {"Retry-After": "1"})
        except Unanswered as error:
            return _error(502, str(error), "unanswered")
        headers = _headers(answer)
        if request.stream:
            return StreamingResponse(_events(answer), media_type="text/event-stream", headers=headers)
        return JSONResponse(answer.body, headers=headers)

    return routes


def _headers(answer: Answer) -> dict[str, str]:
    score = {} if answer.decision.score is None else {"x-lilliput-score": f"{answer.decision.score:.4f}"}
    reason = answer.decision.reason.encode("ascii", "replace").decode()
    return {"x-lilliput-place": answer.place, "x-lilliput-reason": reason, **score}


async def _events(answer: Answer) -> AsyncIterator[str]:
    """The answer as a stream of one piece: it was looked at before anyone could decide to send it."""
    base = {key: answer.body.get(key) for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for delta, reason in (({"role": "assistant", "content": answer.text}, None), ({}, "stop")):
        yield f"data: {json.dumps(base | {'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"
    yield "data: [DONE]\n\n"


def _completion(text: str, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": f"cache-{time.time_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _logprobs(body: Mapping[str, Any]) -> list[float]:
    """The log-likelihoods of the answer's own tokens; none where the server told none."""
    told = (body["choices"][0].get("logprobs") or {}).get("content") or []
    return [float(token["logprob"]) for token in told]


def _error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, dict(headers or {}))
